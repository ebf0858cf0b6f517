"""The transforms of feedback rules: a thought to a thought. xp: see sizes.py."""

from collections.abc import Callable

from coconut.blocks import Array
from coconut.feedback.catalogue import Part
from coconut.feedback.rules import LN_EPS
from coconut.feedback.sizes import normed
from coconut.feedback.thinking import Thinker

# ---- transforms: (thinker, part, a (B, D)) -> (B, D)


def scaled(t: Thinker, part: Part, a: Array) -> Array:
    """The direction of a at the scale of an embedding."""
    learned = part["scale"] == "learned"
    return normed(t.xp, a) * (t.weight("rms.scale") if learned else t.rho)


def ln(t: Thinker, part: Part, a: Array) -> Array:
    """LayerNorm or RMSNorm (the model's kind) without weights, times rho."""
    a = t.xp.at_least_float32(a)
    of_model = t.model.norm_kind
    if (of_model if part["kind"] == "model" else part["kind"]) == "layer":
        a = a - a.mean(axis=-1, keepdims=True)
    return a * (a.square().mean(axis=-1, keepdims=True) + LN_EPS).rsqrt() * t.rho


def final_norm(t: Thinker, part: Part, a: Array) -> Array:
    """The model's own norm before the head."""
    return t.model.final_norm(a)


def linear(t: Thinker, part: Part, a: Array) -> Array:
    """P a + b."""
    return t.xp.linear(a, t.weight("linear.weight"), t.weight("linear.bias"))


def mlp(t: Thinker, part: Part, a: Array) -> Array:
    """A residual block: a + W2 phi(W1 norm(a) + b1) + b2, normed again if asked."""
    inner = normed(t.xp, a) * t.weight("mlp.norm_in")
    inner = t.xp.linear(inner, t.weight("mlp.w1"), t.weight("mlp.b1"))
    a = a + t.xp.linear(activation(t, part, inner), t.weight("mlp.w2"), t.weight("mlp.b2"))
    return normed(t.xp, a) * t.weight("mlp.norm_out") if part["norm_out"] else a


def mlp_plain(t: Thinker, part: Part, a: Array) -> Array:
    """norm(W2 phi(W1 a)): a projection head as published, without the residual."""
    inner = activation(t, part, t.xp.linear(a, t.weight("mlp_plain.w1")))
    if "kept" in t.prepared:
        inner = inner * t.xp.cast(t.prepared["kept"][t.latent], inner)
    return normed(t.xp, t.xp.linear(inner, t.weight("mlp_plain.w2"))) * t.weight("mlp_plain.norm")


def activation(t: Thinker, part: Part, a: Array) -> Array:
    """GELU or SiLU."""
    return t.xp.gelu(a) if part["phi"] == "gelu" else t.xp.silu(a)


def gate(t: Thinker, part: Part, a: Array) -> Array:
    """g a + (1 - g) E[argmax], g read off ĥ."""
    raw = t.xp.linear(t.last, t.weight("gate.weight"), t.weight("gate.bias"))
    g = t.xp.sigmoid(t.xp.at_least_float32(raw))
    return g * a + (1 - g) * t.model.embedding[t.xp.best(t.logits())]


def detach(t: Thinker, part: Part, a: Array) -> Array:
    """A constant: no gradient through time."""
    return t.xp.detach(a)


TRANSFORMS: dict[str, Callable[[Thinker, Part, Array], Array]] = {
    "rms": scaled,
    "ln": ln,
    "final_norm": final_norm,
    "linear": linear,
    "mlp": mlp,
    "mlp_plain": mlp_plain,
    "gate": gate,
    "detach": detach,
}
