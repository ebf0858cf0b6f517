"""What stands in for parts of mlx_lm's models while their forward runs; see borrowed.py."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from coconut.blocks import NEVER, Draw
from mlx_coconut.models.cache import Cache


class Positions:
    """The position of every token of a pass (B, T), in place of a cache's offset.

    Only `Rotary` reads it. It is no number on purpose: a model that uses offsets for anything else
    fails in `check` instead of computing something wrong.
    """

    def __init__(self, of_tokens: mx.array):
        self.of_tokens = of_tokens


class Rotary(nn.Module):
    """mlx_lm's rotary positions, for tokens that are not numbered from one offset on."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: Any = 0, **options) -> mx.array:
        """x (B, H, T, d), turned by each token's own position."""
        if not isinstance(offset, Positions):
            return self.rope(x, offset=offset, **options)
        B, H, T, d = x.shape
        # mlx's kernel has an offset a row, so every token is given as a row of its own.
        rows = x.swapaxes(1, 2).reshape(B * T, H, 1, d)
        turned = self.rope(rows, offset=offset.of_tokens.reshape(-1), **options)
        return turned.reshape(B, T, H, d).swapaxes(1, 2)


class LayerCache:
    """What mlx_lm takes for the cache of one layer: our masks, positions, keys and values."""

    def __init__(
        self,
        cache: Cache | None,
        layer: int,
        positions: mx.array,
        seen: mx.array | None = None,
        mask: mx.array | None = None,
        is_grouped: bool = False,
    ):
        self.cache, self.layer, self.mask, self.seen = cache, layer, mask, seen
        self.positions = positions
        self.offset = Positions(positions)
        self.windows: set[int | None] = set()
        self.is_grouped = is_grouped

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """k, v (B, G, T, d) of the pass -> those of all columns so far."""
        if self.cache is None:
            return k, v
        keys, values = self.cache.update(self.layer, k, v)
        return joined(keys), joined(values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """What the queries of the pass may see, to add to the scores."""
        self.windows.add(window_size)
        mask = self.mask if window_size is None else self._windowed(window_size)
        return mask[:, :, None] if mask is not None and self.is_grouped else mask

    def _windowed(self, window_size: int) -> mx.array:
        keys = self.positions if self.seen is None else self.seen
        near = self.positions[:, :, None] - keys[:, None] < window_size
        far = (1 - near.astype(mx.float32)) * NEVER
        far = far[:, None]
        return far if self.mask is None else self.mask + far.astype(self.mask.dtype)


class Slot:
    """Stands where mlx_lm looks for a block, and has `run` compute it."""

    def __init__(self, block, layer: int, run: Callable):
        self._block, self._layer, self._run = block, layer, run

    def __call__(self, h: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """As a block of mlx_lm's: nothing but a mask and a cache besides the states."""
        return self._run(self._layer, self._block, h, mask)

    def __getattr__(self, name: str):
        return getattr(self._block, name)


class Block:
    """A block as `checkpointed` wants it. draw: where adapters inside find their dropout key."""

    def __init__(self, block, draw: Draw | None):
        self.block, self.draw = block, draw
        self.update, self.trainable_parameters = block.update, block.trainable_parameters

    def __call__(self, x, mask, cache, layer, key, positions):
        if self.draw is not None:
            self.draw.key = key
        # Recomputing asks for every input's gradient; a position has none.
        return self.block(x, mask, LayerCache(cache, layer, mx.stop_gradient(positions)))


class Behind:
    """Stands for the model below the head: whatever it is given, it returns h."""

    def __init__(self, inner, h: mx.array):
        self._inner, self._h = inner, h

    def __call__(self, *args, **options) -> mx.array:
        """h, as an array of its own: mlx_lm multiplies some in place."""
        return self._h + 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def joined(segments: list[mx.array]) -> mx.array:
    """Segments (B, G, S_i, d) as one array."""
    return segments[0] if len(segments) == 1 else mx.concatenate(segments, axis=2)
