"""Sizes and entropies that several rules need."""

import mlx.core as mx

from coconut.feedback import rules as rules
from coconut.feedback.catalogue import Part
from coconut.feedback.rules import EPS


def entropy_of(logits: mx.array) -> mx.array:
    """Entropy in nats (...) of the distribution that float32 logits (..., V) stand for."""
    p = mx.softmax(logits, axis=-1)
    return -(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)


def rho(model) -> mx.array:
    """Mean over the vocabulary of the rms of an embedding row, without gradient."""
    return rms(mx.stop_gradient(model.embedding)).mean()


def rms(a: mx.array) -> mx.array:
    """Root mean square over the last axis, kept, in float32."""
    a = a.astype(mx.float32)
    return mx.sqrt((a * a).mean(axis=-1, keepdims=True))


def normed(a: mx.array) -> mx.array:
    """a / max(rms(a), EPS), in float32; the gradient at 0 is finite."""
    a = a.astype(mx.float32)
    return a / mx.sqrt(mx.maximum((a * a).mean(axis=-1, keepdims=True), EPS * EPS))


def over_threshold(drop: mx.array, before: mx.array, part: Part) -> mx.array:
    """Where a drop counts: above the threshold, or among the k largest."""
    kind, x = part["threshold"]
    if kind == "topk":
        return (drop > 0) & (drop >= kth_largest(drop, int(x)))
    return drop > (x * rms(before) if kind == "rel" else x)


def kth_largest(a: mx.array, k: int) -> mx.array:
    """(..., 1): the k-th largest entry of the last axis."""
    n = a.shape[-1]
    k = min(k, n)
    return mx.partition(a, n - k, axis=-1)[..., n - k : n - k + 1]


def norm(a: mx.array) -> mx.array:
    """L2 norm over the last axis, kept, not below 1e-12."""
    return mx.sqrt(mx.maximum((a * a).sum(axis=-1, keepdims=True), 1e-24))


def largest(a: mx.array, k: int) -> mx.array:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    a = mx.stop_gradient(a)
    k = min(k, a.shape[-1])
    if k == a.shape[-1]:
        return mx.argsort(-a, axis=-1)
    index = mx.argpartition(-a, k - 1, axis=-1)[..., :k]
    order = mx.argsort(-mx.take_along_axis(a, index, axis=-1), axis=-1)
    return mx.take_along_axis(index, order, axis=-1)


def best(logits: mx.array) -> mx.array:
    """The likeliest token (B,) of each row."""
    return mx.argmax(mx.stop_gradient(logits), axis=-1)
