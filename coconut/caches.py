"""Keys and values while decoding: joined, with room for new tokens, those of a prompt kept once.

xp: the array functions of the twin, its models/arrays.py.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from coconut.batches.batch import rows_of
from coconut.blocks import Array


class Sharing:
    """Which rows go on from the same prompt, so that its keys are read once for all of them."""

    def __init__(self, xp: Any, source: np.ndarray, like: Array):
        """source (R,): the prompt of each row. `prompts` (P,) are those in use, ascending."""
        self.prompts, table, place = rows_of(source)
        self.shape = table.shape
        # None: rows stand by prompt, as many of each.
        is_even = np.array_equal(table.reshape(-1), np.arange(len(source)))
        self.table = None if is_even else xp.from_host(table.reshape(-1), like)
        self.place = None if is_even else xp.from_host(place, like)

    def multiply(self, x: Array, of_prompts: Array) -> Array:
        """Rows (R, G, T, n) times the matrix (G, n, m) of each one's prompt: (R, G, T, m)."""
        (P, M), (_, G, T, n) = self.shape, x.shape
        x = x if self.table is None else x[self.table]
        x = x.reshape(P, M, G, T, n).swapaxes(1, 2).reshape(P, G, M * T, n) @ of_prompts
        x = x.reshape(P, G, M, T, -1).swapaxes(1, 2).reshape(P * M, G, T, -1)
        return x if self.place is None else x[self.place]


@dataclass
class Shared:
    """Keys or values (P, G, S, d) of prompts, each read by all rows that go on from it."""

    array: Array
    sharing: Sharing


class Cache(Protocol):
    """Takes a layer's new keys and values, gives back all of them as segments."""

    def update(self, layer: int, k: Array, v: Array) -> tuple[list, list]:
        """k, v (B, G, T, d) of the pass; lists of arrays (B, G, S, d) or of `Shared`."""


class DecodeCache:
    """Joined segments with room for new tokens; grows by `STEP` columns, drops finished rows.

    Rows that go on from one prompt can share its segments and have only new tokens of their own.
    """

    STEP = 64
    xp: Any

    def __init__(self, prefix: Any, source: np.ndarray, shares: bool):
        """source (R,): the prompt of each row, a number of a row of the prefix.

        prefix: the twin's `SegmentCache` of the prompts. shares: whether the model reads shared
        segments; else every row has a copy.
        """
        xp, R, like = self.xp, len(source), prefix.keys[0][0]
        self.sharing: Sharing | None = None
        goes_on = np.array_equal(source, np.arange(len(like)))

        def joined(segments: list[Array]) -> Array:
            # With room at once: a question's keys are copied once.
            P, G, _, d = segments[0].shape
            room = [xp.zeros((P, G, self.STEP, d), segments[0])] if goes_on else []
            return xp.concatenate([*segments, *room], axis=2)

        keys, values = (list(map(joined, layers)) for layers in (prefix.keys, prefix.values))
        self.used = [k.shape[2] - self.STEP * goes_on for k in keys]
        if not goes_on and shares:
            self.prompt_keys, self.prompt_values = keys, values
            self._share(source)
            keys = [xp.zeros((R, k.shape[1], 0, k.shape[3]), k) for k in keys]
            values, self.used = keys[:], [0] * len(keys)
        elif not goes_on:
            index = xp.from_host(source, like)
            keys, values = ([a[index] for a in arrays] for arrays in (keys, values))
        self.keys, self.values = keys, values

    def update(self, layer: int, k: Array, v: Array) -> tuple[list, list]:
        """k, v (R, G, T, d) of new tokens. Returns all segments, shared ones first."""
        start, end = self.used[layer], self.used[layer] + k.shape[2]
        if end > self.keys[layer].shape[2]:
            R, G, T, d = k.shape
            room = self.xp.zeros((R, G, max(self.STEP, T), d), k)
            for kept in (self.keys, self.values):
                kept[layer] = self.xp.concatenate([kept[layer][:, :, :start], room], axis=2)
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
        index = self.xp.from_host(rows, self.keys[0])
        self.keys = [k[index] for k in self.keys]
        self.values = [v[index] for v in self.values]
        if self.sharing is not None:
            self._share(self.source[rows])

    def _share(self, source: np.ndarray) -> None:
        self.sharing = Sharing(self.xp, source, self.prompt_keys[0])
        used = self.sharing.prompts
        if len(used) < len(self.prompt_keys[0]):
            index = self.xp.from_host(used, self.prompt_keys[0])
            self.prompt_keys = [k[index] for k in self.prompt_keys]
            self.prompt_values = [v[index] for v in self.prompt_values]
        self.source = np.searchsorted(used, source)
