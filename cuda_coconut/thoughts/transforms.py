"""The transforms of feedback rules: a thought to a thought."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from coconut.feedback import rules as rules
from coconut.feedback.catalogue import Part
from cuda_coconut.thoughts.numbers import at_least_float32, best, normed
from cuda_coconut.thoughts.thinker import Thinker

# ---- transforms: (thinker, part, a (B, D)) -> (B, D)


def scaled(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """The direction of a at the scale of an embedding."""
    learned = part["scale"] == "learned"
    return normed(a) * (t.weight("rms.scale") if learned else t.rho)


def ln(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """LayerNorm or RMSNorm (the model's kind) without weights, times rho."""
    a = at_least_float32(a)
    of_model = t.model.norm_kind
    if (of_model if part["kind"] == "model" else part["kind"]) == "layer":
        a = a - a.mean(dim=-1, keepdim=True)
    return a * (a.square().mean(dim=-1, keepdim=True) + rules.LN_EPS).rsqrt() * t.rho


def final_norm(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """The model's own norm before the head."""
    return t.model.final_norm(a)


def linear(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """P a + b."""
    return F.linear(a, t.weight("linear.weight"), t.weight("linear.bias"))


def mlp(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """A residual block: a + W2 phi(W1 norm(a) + b1) + b2, normed again if asked."""
    inner = normed(a) * t.weight("mlp.norm_in")
    inner = F.linear(inner, t.weight("mlp.w1"), t.weight("mlp.b1"))
    a = a + F.linear(activation(part, inner), t.weight("mlp.w2"), t.weight("mlp.b2"))
    return normed(a) * t.weight("mlp.norm_out") if part["norm_out"] else a


def mlp_plain(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """norm(W2 phi(W1 a)): a projection head as published, without the residual."""
    inner = activation(part, F.linear(a, t.weight("mlp_plain.w1")))
    if "kept" in t.prepared:
        inner = inner * t.prepared["kept"][t.latent].to(inner.dtype)
    return normed(F.linear(inner, t.weight("mlp_plain.w2"))) * t.weight("mlp_plain.norm")


def activation(part: Part, a: torch.Tensor) -> torch.Tensor:
    """GELU or SiLU."""
    return F.gelu(a) if part["phi"] == "gelu" else F.silu(a)


def gate(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """g a + (1 - g) E[argmax], g read off ĥ."""
    raw = F.linear(t.last, t.weight("gate.weight"), t.weight("gate.bias"))
    g = at_least_float32(raw).sigmoid()
    return g * a + (1 - g) * t.model.embedding[best(t.logits())]


def detach(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """A constant: no gradient through time."""
    return a.detach()


TRANSFORMS: dict[str, Callable[[Thinker, Part, torch.Tensor], torch.Tensor]] = {
    "rms": scaled,
    "ln": ln,
    "final_norm": final_norm,
    "linear": linear,
    "mlp": mlp,
    "mlp_plain": mlp_plain,
    "gate": gate,
    "detach": detach,
}
