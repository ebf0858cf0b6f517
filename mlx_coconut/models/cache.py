"""Key/value caches: one that gradients flow through, one with room for decoded tokens."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from coconut.batches.batch import rows_of


class Sharing:
    """Which rows go on from the same prompt, so that its keys are read once for all of them."""

    def __init__(self, source: np.ndarray):
        """source (R,): the prompt of each row. `prompts` (P,) are those in use, ascending."""
        self.prompts, table, place = rows_of(source)
        self.shape = table.shape
        # None: rows stand by prompt, as many of each.
        is_even = np.array_equal(table.reshape(-1), np.arange(len(source)))
        self.table = None if is_even else mx.array(table.reshape(-1))
        self.place = None if is_even else mx.array(place)

    def multiply(self, x: mx.array, of_prompts: mx.array) -> mx.array:
        """Rows (R, G, T, n) times the matrix (G, n, m) of each one's prompt: (R, G, T, m)."""
        (P, M), (_, G, T, n) = self.shape, x.shape
        x = x if self.table is None else x[self.table]
        x = x.reshape(P, M, G, T, n).swapaxes(1, 2).reshape(P, G, M * T, n) @ of_prompts
        x = x.reshape(P, G, M, T, -1).swapaxes(1, 2).reshape(P * M, G, T, -1)
        return x if self.place is None else x[self.place]


@dataclass
class Shared:
    """Keys or values (P, G, S, d) of prompts, each read by all rows that go on from it."""

    array: mx.array
    sharing: Sharing


Segment = mx.array | Shared
"""Keys or values (B, G, S, d) of some columns."""


class Cache(Protocol):
    """Takes a layer's new keys and values, gives back all of them as segments."""

    def update(
        self, layer: int, k: mx.array, v: mx.array
    ) -> tuple[list[Segment], list[Segment]]: ...


class SegmentCache:
    """Keeps each pass's keys and values as they are; differentiable, and nothing is copied."""

    def __init__(self, n_layers: int):
        self.keys: list[list[mx.array]] = [[] for _ in range(n_layers)]
        self.values: list[list[mx.array]] = [[] for _ in range(n_layers)]

    def update(self, layer, k, v):
        """k, v (B, G, T, d) of the pass. Returns lists of all segments so far, in order."""
        # New lists: a recomputed block is handed the old ones and must not grow them.
        self.keys[layer] = [*self.keys[layer], k]
        self.values[layer] = [*self.values[layer], v]
        return self.keys[layer], self.values[layer]


class DecodeCache:
    """Joined segments with room for new tokens; grows by `STEP` columns, drops finished rows.

    Rows that go on from one prompt can share its segments and have only new tokens of their own.
    """

    STEP = 64

    def __init__(self, prefix: SegmentCache, source: np.ndarray, shares: bool):
        """source (R,): the prompt of each row, a number of a row of the prefix.

        shares: whether the model reads shared segments; else every row has a copy.
        """
        keys, values = ([_join(s) for s in layers] for layers in (prefix.keys, prefix.values))
        self.sharing: Sharing | None = None
        R = len(source)
        if not np.array_equal(source, np.arange(len(keys[0]))):
            if shares:
                self.prompt_keys, self.prompt_values = keys, values
                self._share(source)
                keys = [mx.zeros((R, k.shape[1], 0, k.shape[3]), k.dtype) for k in keys]
                values = keys[:]
            else:
                index = mx.array(source)
                keys, values = ([a[index] for a in arrays] for arrays in (keys, values))
        self.keys, self.values = keys, values
        self.used = [k.shape[2] for k in keys]

    def update(self, layer, k, v):
        """k, v (R, G, T, d) of new tokens. Returns all segments, shared ones first."""
        start, end = self.used[layer], self.used[layer] + k.shape[2]
        if end > self.keys[layer].shape[2]:
            R, G, T, d = k.shape
            room = mx.zeros((R, G, max(self.STEP, T), d), k.dtype)
            self.keys[layer] = mx.concatenate([self.keys[layer][:, :, :start], room], axis=2)
            self.values[layer] = mx.concatenate([self.values[layer][:, :, :start], room], axis=2)
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        self.used[layer] = end
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        if self.sharing is None:
            return [keys], [values]
        prompt = Shared(self.prompt_keys[layer], self.sharing)
        return [prompt, keys], [Shared(self.prompt_values[layer], self.sharing), values]

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows of the batch."""
        index = mx.array(rows)
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        if self.sharing is not None:
            self._share(self.source[rows])

    def _share(self, source: np.ndarray) -> None:
        self.sharing = Sharing(source)
        used = self.sharing.prompts
        if len(used) < len(self.prompt_keys[0]):
            index = mx.array(used)
            self.prompt_keys = [k[index] for k in self.prompt_keys]
            self.prompt_values = [v[index] for v in self.prompt_values]
        self.source = np.searchsorted(used, source)


def _join(segments: list[mx.array]) -> mx.array:
    return segments[0] if len(segments) == 1 else mx.concatenate(segments, axis=2)
