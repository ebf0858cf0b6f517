"""Key/value caches: one that gradients flow through, one with room for decoded tokens."""

from __future__ import annotations

from typing import Protocol

import torch


class Cache(Protocol):
    """Takes a layer's new keys and values, gives back all of them as segments."""

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...


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


class DecodeCache:
    """Joined segments with room for new tokens; grows by `STEP` columns, drops finished rows."""

    STEP = 64

    def __init__(self, prefix: SegmentCache):
        self.keys = [_join(segments) for segments in prefix.keys]
        self.values = [_join(segments) for segments in prefix.values]
        self.used = [k.shape[2] for k in self.keys]

    def update(self, layer, k, v):
        """k, v (B, G, 1, d) of the new token. Returns one segment each: (B, G, used + 1, d)."""
        start, end = self.used[layer], self.used[layer] + k.shape[2]
        if end > self.keys[layer].shape[2]:
            B, G, _, d = k.shape
            room = k.new_zeros((B, G, max(self.STEP, k.shape[2]), d))
            self.keys[layer] = torch.cat([self.keys[layer][:, :, :start], room], dim=2)
            self.values[layer] = torch.cat([self.values[layer][:, :, :start], room], dim=2)
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        self.used[layer] = end
        return [self.keys[layer][:, :, :end]], [self.values[layer][:, :, :end]]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


def _grown(segments: list[torch.Tensor], new: torch.Tensor) -> list[torch.Tensor]:
    if not segments:
        return [new]
    # twin: torch starts a kernel for every product, so the few columns behind the first latent are
    # joined. The long first segment is made contiguous once; products would copy it in each pass.
    first, *later = segments
    return [first.contiguous(), torch.cat([*later, new], dim=2) if later else new]


def _join(segments: list[torch.Tensor]) -> torch.Tensor:
    return segments[0] if len(segments) == 1 else torch.cat(segments, dim=2)
