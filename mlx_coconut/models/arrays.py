"""The array functions that code of both twins is written in; see coconut/feedback/sizes.py."""

from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import numpy as np
from mlx.core import (  # noqa: F401
    broadcast_to,
    clip,
    concatenate,
    sigmoid,
    softmax,
    stack,
    take_along_axis,
    zeros_like,
)
from mlx.core import max as amax  # noqa: F401
from mlx.core import stop_gradient as detach
from mlx.nn import gelu, silu  # noqa: F401

from coconut.blocks import NEVER


def queues(a: mx.array) -> bool:
    """Whether the host can go on before an array like this one is computed."""
    return mx.default_device() == mx.gpu


def from_host(array: np.ndarray, like: mx.array) -> mx.array:
    """A host array beside another one of the device's."""
    return mx.array(array)


def to_host(a: mx.array) -> np.ndarray:
    """An array as numpy's."""
    return np.array(a)


def zeros(shape: tuple[int, ...], like: mx.array) -> mx.array:
    """Zeros of another array's type."""
    return mx.zeros(shape, like.dtype)


def cast(a: mx.array, like: mx.array) -> mx.array:
    """a in the type of another array."""
    return a.astype(like.dtype)


def at_least_float32(a: mx.array) -> mx.array:
    """bfloat16 as float32; float64 stays."""
    return a if a.dtype == mx.float64 else a.astype(mx.float32)


def unrounded(a: mx.array) -> AbstractContextManager[None]:
    """Inside, products of arrays like this one are computed in their own type."""
    return nullcontext()


def linear(a: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """W a, or W a + b."""
    return a @ weight.T if bias is None else a @ weight.T + bias


def ones_where(condition: mx.array) -> mx.array:
    """1 where a condition holds, 0 elsewhere, as a constant to multiply with."""
    return detach(condition.astype(mx.float32))


def never_where(condition: mx.array, logits: mx.array) -> mx.array:
    """The logits with NEVER where a condition holds."""
    chosen = ones_where(condition)
    return logits * (1 - chosen) + chosen * NEVER


def last_column(h: mx.array) -> mx.array:
    """The last column (B, D) of states (B, T, D)."""
    return h[:, -1]


def kth_largest(a: mx.array, k: int) -> mx.array:
    """(..., 1): the k-th largest entry of the last axis."""
    n = a.shape[-1]
    k = min(k, n)
    return mx.partition(a, n - k, axis=-1)[..., n - k : n - k + 1]


def largest(a: mx.array, k: int) -> mx.array:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    a = detach(a)
    k = min(k, a.shape[-1])
    if k == a.shape[-1]:
        return mx.argsort(-a, axis=-1)
    index = mx.argpartition(-a, k - 1, axis=-1)[..., :k]
    order = mx.argsort(-take_along_axis(a, index, axis=-1), axis=-1)
    return take_along_axis(index, order, axis=-1)


def best(logits: mx.array) -> mx.array:
    """The likeliest token (B,) of each row."""
    return mx.argmax(detach(logits), axis=-1)


def inverse_of(W: mx.array, lam: float) -> mx.array:
    """(WᵀW + λI)⁻¹ (B, D, D) of each row's W (B, k, D), solved in float64.

    λ is lam times the mean of WᵀW's diagonal.
    """
    with mx.stream(mx.cpu):  # twin: MLX has float64 and inverses on the CPU only
        W = W.astype(mx.float64)
        gram = W.swapaxes(-1, -2) @ W
        scale = lam * mx.trace(gram, axis1=-2, axis2=-1) / gram.shape[-1]
        eye = mx.eye(gram.shape[-1], dtype=mx.float64)
        return mx.linalg.inv(gram + scale[:, None, None] * eye).astype(mx.float32)


def gram(rows: mx.array) -> np.ndarray:
    """rowsᵀ rows (D, D) of (n, D), for an inverse: a GPU might round its products."""
    with mx.stream(mx.cpu):
        return np.array(rows.T @ rows)
