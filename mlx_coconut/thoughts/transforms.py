"""The transforms of feedback rules: a thought to a thought."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from coconut.feedback import rules as rules
from coconut.feedback.catalogue import Part
from mlx_coconut.thoughts.numbers import best, normed
from mlx_coconut.thoughts.thinker import Thinker

# ---- transforms: (thinker, part, a (B, D)) -> (B, D)


def scaled(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """The direction of a at the scale of an embedding."""
    learned = part["scale"] == "learned"
    return normed(a) * (t.weight("rms.scale") if learned else t.rho)


def ln(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """LayerNorm or RMSNorm (the model's kind) without weights, times rho."""
    a = a.astype(mx.float32)
    of_model = t.model.norm_kind
    if (of_model if part["kind"] == "model" else part["kind"]) == "layer":
        a = a - a.mean(axis=-1, keepdims=True)
    return a * mx.rsqrt((a * a).mean(axis=-1, keepdims=True) + rules.LN_EPS) * t.rho


def final_norm(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """The model's own norm before the head."""
    return t.model.final_norm(a)


def linear(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """P a + b."""
    return a @ t.weight("linear.weight").T + t.weight("linear.bias")


def mlp(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """A residual block: a + W2 phi(W1 norm(a) + b1) + b2, normed again if asked."""
    inner = normed(a) * t.weight("mlp.norm_in")
    inner = inner @ t.weight("mlp.w1").T + t.weight("mlp.b1")
    a = a + activation(part, inner) @ t.weight("mlp.w2").T + t.weight("mlp.b2")
    return normed(a) * t.weight("mlp.norm_out") if part["norm_out"] else a


def mlp_plain(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """norm(W2 phi(W1 a)): a projection head as published, without the residual."""
    inner = activation(part, a @ t.weight("mlp_plain.w1").T)
    if "kept" in t.prepared:
        inner = inner * t.prepared["kept"][t.latent].astype(inner.dtype)
    return normed(inner @ t.weight("mlp_plain.w2").T) * t.weight("mlp_plain.norm")


def activation(part: Part, a: mx.array) -> mx.array:
    """GELU or SiLU."""
    return nn.gelu(a) if part["phi"] == "gelu" else nn.silu(a)


def gate(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """g a + (1 - g) E[argmax], g read off ĥ."""
    raw = t.last @ t.weight("gate.weight").T + t.weight("gate.bias")
    g = mx.sigmoid(raw.astype(mx.float32))
    return g * a + (1 - g) * t.model.embedding[best(t.logits())]


def detach(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """A constant: no gradient through time."""
    return mx.stop_gradient(a)


TRANSFORMS: dict[str, Callable[[Thinker, Part, mx.array], mx.array]] = {
    "rms": scaled,
    "ln": ln,
    "final_norm": final_norm,
    "linear": linear,
    "mlp": mlp,
    "mlp_plain": mlp_plain,
    "gate": gate,
    "detach": detach,
}
