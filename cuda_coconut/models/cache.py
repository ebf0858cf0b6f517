"""Key/value caches: one that gradients flow through, one with room for decoded tokens."""

import numpy as np
import torch

from coconut import caches
from coconut.caches import Cache as Cache
from coconut.caches import Shared
from cuda_coconut.models import arrays

Segment = torch.Tensor | Shared
"""Keys or values (B, G, S, d) of some columns."""


class SegmentCache:
    """Keeps the first pass's keys and values apart from the later ones; differentiable."""

    def __init__(self, n_layers: int):
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(n_layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(n_layers)]

    def update(self, layer, k, v):
        """k, v (B, G, T, d) of the pass. Returns one or two segments, in order."""
        # New lists: a recomputed block is handed the old ones and must not grow them.
        self.keys[layer] = _grown(self.keys[layer], k)
        self.values[layer] = _grown(self.values[layer], v)
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


def _grown(segments: list[torch.Tensor], new: torch.Tensor) -> list[torch.Tensor]:
    if not segments:
        return [new]
    # twin: torch starts a kernel for every product, so the few columns behind the first latent are
    # joined. The long first segment is made contiguous once; products would copy it in each pass.
    first, *later = segments
    return [first.contiguous(), torch.cat([*later, new], dim=2) if later else new]
