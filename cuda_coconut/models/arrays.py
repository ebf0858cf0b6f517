"""The array functions that code of both twins is written in; see coconut/feedback/sizes.py."""

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import amax, broadcast_to, clip, concatenate, detach, sigmoid, softmax, stack, zeros_like  # noqa: F401
from torch import take_along_dim as take_along_axis  # noqa: F401
from torch.nn.functional import gelu, silu  # noqa: F401

from coconut.blocks import NEVER


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A host array as a tensor, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    # Only from pinned memory does the copy run beside the host.
    return tensor.pin_memory().to(device, non_blocking=True)


def queues(a: torch.Tensor) -> bool:
    """Whether the host can go on before an array like this one is computed."""
    return a.is_cuda


def from_host(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """A host array beside another one of the device's."""
    return to_device(array, like.device)


def to_host(a: torch.Tensor) -> np.ndarray:
    """An array as numpy's."""
    return a.detach().cpu().numpy()


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of another array's type."""
    return like.new_zeros(shape)


def cast(a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """a in the type of another array."""
    return a.to(like.dtype)


def at_least_float32(a: torch.Tensor) -> torch.Tensor:
    """bfloat16 as float32; float64 stays."""
    return a if a.dtype == torch.float64 else a.float()


def unrounded(a: torch.Tensor) -> AbstractContextManager[None]:
    """Inside, products of arrays like this one are computed in their own type."""
    return torch.autocast(a.device.type, enabled=False)


def linear(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """W a, or W a + b."""
    return F.linear(a, weight, bias)


def ones_where(condition: torch.Tensor) -> torch.Tensor:
    """1 where a condition holds, 0 elsewhere, as a constant to multiply with."""
    return condition


def never_where(condition: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The logits with NEVER where a condition holds."""
    return logits.masked_fill(condition, NEVER)


def last_column(h: torch.Tensor) -> torch.Tensor:
    """The last column (B, D) of states (B, T, D)."""
    return h[:, -1].clone()  # a view would keep all of h


def kth_largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """(..., 1): the k-th largest entry of the last axis."""
    return a.topk(min(k, a.shape[-1]), dim=-1).values[..., -1:]


def largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    return a.detach().topk(min(k, a.shape[-1]), dim=-1).indices


def best(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token (B,) of each row."""
    return logits.argmax(dim=-1)


def inverse_of(W: torch.Tensor, lam: float) -> torch.Tensor:
    """(WᵀW + λI)⁻¹ (B, D, D) of each row's W (B, k, D), solved in float64.

    λ is lam times the mean of WᵀW's diagonal.
    """
    gram = W.double().mT @ W.double()
    scale = lam * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Without the check, for which the host would wait: gram + scale is positive.
    inverse, _ = torch.linalg.inv_ex(gram + scale[:, None, None] * eye)
    return inverse.to(W.dtype)


def gram(rows: torch.Tensor) -> np.ndarray:
    """rowsᵀ rows (D, D) of (n, D), for an inverse: a GPU might round its products."""
    rows = rows.cpu()
    with unrounded(rows):
        return to_host(rows.T @ rows)
