"""Sizes and entropies that several rules need.

xp in this room: the array functions of a twin, its models/arrays.py. What the arrays of both have
as methods is written as one, with numpy's `axis` and `keepdims`.
"""

from typing import Any

from coconut.blocks import Array
from coconut.feedback.catalogue import Part
from coconut.feedback.rules import EPS


def entropy_of(xp: Any, logits: Array) -> Array:
    """Entropy in nats (...) of the distribution that float32 logits (..., V) stand for."""
    p = xp.softmax(logits, axis=-1)
    return -(p * xp.clip(p, 1e-30, None).log()).sum(axis=-1)


def rho(xp: Any, model: Any) -> Array:
    """Mean over the vocabulary of the rms of an embedding row, without gradient."""
    return rms(xp, xp.detach(model.embedding)).mean()


def rms(xp: Any, a: Array) -> Array:
    """Root mean square over the last axis, kept, in float32."""
    return xp.at_least_float32(a).square().mean(axis=-1, keepdims=True).sqrt()


def normed(xp: Any, a: Array) -> Array:
    """a / max(rms(a), EPS), in float32; the gradient at 0 is finite."""
    a = xp.at_least_float32(a)
    return a / xp.clip(a.square().mean(axis=-1, keepdims=True), EPS * EPS, None).sqrt()


def norm(xp: Any, a: Array) -> Array:
    """L2 norm over the last axis, kept, not below 1e-12."""
    return xp.clip(a.square().sum(axis=-1, keepdims=True), 1e-24, None).sqrt()


def over_threshold(xp: Any, drop: Array, before: Array, part: Part) -> Array:
    """1 where a drop counts, above the threshold or among the k largest; 0 elsewhere."""
    kind, x = part["threshold"]
    if kind == "topk":
        return xp.ones_where((drop > 0) & (drop >= xp.kth_largest(drop, int(x))))
    return xp.ones_where(drop > (x * rms(xp, before) if kind == "rel" else x))
