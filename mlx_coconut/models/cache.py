"""Key/value caches: one that gradients flow through, one with room for decoded tokens."""

import mlx.core as mx
import numpy as np

from coconut import caches
from coconut.caches import Cache as Cache
from coconut.caches import Shared
from mlx_coconut.models import arrays

Segment = mx.array | Shared
"""Keys or values (B, G, S, d) of some columns."""


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

    def go_on(self, source: np.ndarray) -> None:
        """Rows of the batch in place of those so far: row r goes on from row source[r].

        Each has a copy: on a CPU attention over one array of keys is faster than over a shared one.
        """
        index = arrays.from_host(source, self.keys[0][0])
        self.keys = [[k[index] for k in kept] for kept in self.keys]
        self.values = [[v[index] for v in kept] for kept in self.values]


class DecodeCache(caches.DecodeCache):
    """Joined segments with room for new tokens; see coconut/caches.py."""

    xp = arrays
