"""Sizes and entropies that several rules need."""

import torch

from coconut.feedback import rules as rules
from coconut.feedback.catalogue import Part
from coconut.feedback.rules import EPS


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats (...) of the distribution that float32 logits (..., V) stand for."""
    p = logits.softmax(dim=-1)
    return -(p * p.clamp(min=1e-30).log()).sum(dim=-1)


def rho(model) -> torch.Tensor:
    """Mean over the vocabulary of the rms of an embedding row, without gradient."""
    return rms(model.embedding.detach()).mean()


def at_least_float32(a: torch.Tensor) -> torch.Tensor:
    """bfloat16 as float32; float64 stays."""
    return a if a.dtype == torch.float64 else a.float()


def rms(a: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last axis, kept, in float32."""
    return at_least_float32(a).square().mean(dim=-1, keepdim=True).sqrt()


def normed(a: torch.Tensor) -> torch.Tensor:
    """a / max(rms(a), EPS), in float32; the gradient at 0 is finite."""
    a = at_least_float32(a)
    return a / a.square().mean(dim=-1, keepdim=True).clamp(min=EPS * EPS).sqrt()


def over_threshold(drop: torch.Tensor, before: torch.Tensor, part: Part) -> torch.Tensor:
    """Where a drop counts: above the threshold, or among the k largest."""
    kind, x = part["threshold"]
    if kind == "topk":
        return (drop > 0) & (drop >= kth_largest(drop, int(x)))
    return drop > (x * rms(before) if kind == "rel" else x)


def kth_largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """(..., 1): the k-th largest entry of the last axis."""
    return a.topk(min(k, a.shape[-1]), dim=-1).values[..., -1:]


def norm(a: torch.Tensor) -> torch.Tensor:
    """L2 norm over the last axis, kept, not below 1e-12."""
    return a.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt()


def largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    return a.detach().topk(min(k, a.shape[-1]), dim=-1).indices


def best(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token (B,) of each row."""
    return logits.argmax(dim=-1)
