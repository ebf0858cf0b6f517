"""What stands in for parts of transformers' models while their forward runs; see borrowed.py."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from coconut.blocks import NEVER, RECORD, Draw
from coconut.errors import UserError
from cuda_coconut.models.base import Mask, as_linear, attend
from cuda_coconut.models.cache import Cache

ATTENTION = "coconut"
"""The name that `attention` is registered by in transformers."""
CACHE_NAMES = ("cache", "past_key_values")
"""What a block calls its cache, from transformers 5.24 on and before."""


class Sight:
    """What the queries of a pass may see. transformers hands it to our attention as the mask.

    mask: to add to the scores, see `attend`. positions (B, T) of the pass, seen (B, S) of all
    columns.
    """

    def __init__(self, mask: Mask, positions: torch.Tensor, seen: torch.Tensor | None):
        self.mask, self.positions = mask, positions
        self.seen = positions if seen is None else seen
        self._windowed: dict[int, torch.Tensor] = {}

    def within(self, window: int | None, dtype: torch.dtype) -> Mask:
        """The mask of a layer that sees only the positions less than `window` before."""
        if window is None:
            return self.mask
        if window not in self._windowed:
            near = self.positions[:, :, None] - self.seen[:, None] < window
            if isinstance(self.mask, str):
                near = near.tril()
            far = torch.zeros(near.shape, dtype=dtype, device=near.device)
            far = far.masked_fill_(~near, NEVER)[:, None]
            is_tensor = isinstance(self.mask, torch.Tensor)
            self._windowed[window] = far + self.mask if is_tensor else far
        return self._windowed[window]


class LayerCache:
    """What transformers takes for the cache: our keys and values of one layer."""

    def __init__(self, cache: Cache, layer: int):
        self.cache, self.layer = cache, layer

    def update(self, k: torch.Tensor, v: torch.Tensor, *unused, **options):
        """k, v (B, G, T, d) of the pass -> the segments of all columns so far."""
        return self.cache.update(self.layer, k, v)


class Slot:
    """Stands in place of a block's forward, and has the model's `run` compute it, if there is one.

    run: None lets transformers' own forward through.
    """

    def __init__(self, block: nn.Module, layer: int):
        self.forward, self.layer, self.cache_name = block.forward, layer, cache_name(block)
        self.run: Callable | None = None

    def __call__(self, h: torch.Tensor, **options) -> torch.Tensor:
        """As a block of transformers': all but the states by name."""
        if self.run is None:
            return self.forward(h, **options)
        return self.run(self, h, options)


class Block:
    """A block as `checkpointed` wants it. draw: where adapters inside find their dropout key."""

    def __init__(self, slot: Slot, draw: Draw | None):
        self.slot, self.draw = slot, draw

    def __call__(self, x, mask, cache, layer, key, options):
        if self.draw is not None:
            self.draw.key = key
        own = {"attention_mask": mask, self.slot.cache_name: LayerCache(cache, layer)}
        return self.slot.forward(x, **options | own)


class Behind:
    """Stands for the model below the head: whatever it is given, it returns h."""

    def __init__(self, inner: nn.Module, h: torch.Tensor):
        self._inner, self._h = inner, h

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __call__(self, *args, **options):
        """h, as transformers' models return it."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._h)


class TiedHead(nn.Module):
    """A head that is the table of input embeddings, whatever stands there; it owns no weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._of = (model,)  # in a tuple, so that it is no part of this module

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """States (..., D) -> logits (..., V)."""
        return as_linear(self._of[0].model.embed_tokens, h)


def attention(
    module,
    q: torch.Tensor,
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    sight: Sight,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Our attention, as transformers calls one: q (B, H, T, d) -> (B, T, H, d).

    k, v: segments, see `attend`. softcap: bound of the scores (Gemma 2).
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    if softcap is not None and RECORD.get() is not None:
        raise UserError(
            f"model_type {module.config.model_type!r}",
            "its attention cannot be looked into: its scores are bent before they become weights",
        )
    mask, d = sight.within(sliding_window, q.dtype), q.shape[-1]
    if scaling is not None:
        q = q * (scaling * d**0.5)  # attend divides by sqrt(d)
    out = attend(q, k, v, mask) if softcap is None else _capped(q, k, v, mask, softcap)
    return out.transpose(1, 2), None


def _capped(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    mask: Mask,
    bound: float,
) -> torch.Tensor:
    """As `attend`, with scores bent to stay within (-bound, bound)."""
    B, H, T, d = q.shape
    k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    grouped = (q * d**-0.5).reshape(B, k.shape[1], -1, d)
    scores = ((grouped @ k.transpose(-1, -2)) / bound).tanh() * bound
    scores = scores.view(B, H, T, -1)
    if isinstance(mask, str):
        mask = torch.full((T, T), NEVER, dtype=q.dtype, device=q.device).triu_(1)
    p = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32)
    out = p.to(v.dtype).view(B, k.shape[1], -1, p.shape[-1]) @ v
    return out.view(B, H, T, d)


def accepted(block: nn.Module) -> set[str]:
    """Names of what a block's forward takes."""
    return set(inspect.signature(type(block).forward).parameters)


def cache_name(block: nn.Module) -> str:
    """What a block calls its cache; empty if it takes none."""
    return next((name for name in CACHE_NAMES if name in accepted(block)), "")
