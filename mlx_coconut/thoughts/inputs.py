"""What a forward pass reads of a batch, on the device."""

from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx
import numpy as np

from coconut.batches.batch import Batch, Beginning
from mlx_coconut.models.base import additive_mask


@dataclass
class Inputs:
    """The arrays of a Batch that a forward pass reads; shapes: coconut/batches/batch.py."""

    ids: mx.array
    mask: mx.array
    positions: mx.array
    is_latent: mx.array
    segments: mx.array | None = None
    beginning: Beginning | None = None
    """What rows have in common; its arrays stay on the host."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Copy from the host."""
        segments = None if batch.segments is None else mx.array(batch.segments)
        arrays = map(mx.array, (batch.ids, batch.mask, batch.positions, batch.is_latent))
        return cls(*arrays, segments, batch.beginning)

    def begun(self) -> Self:
        """The columns that rows have in common, a row for each beginning."""
        width, first = self.beginning.width, mx.array(self.beginning.first)
        arrays = (self.ids, self.mask, self.positions, self.is_latent)
        return type(self)(*(a[first, :width] for a in arrays))

    def latents_on_host(self) -> np.ndarray:
        """(B, T) bool: which columns are latents of a row, spared ones left out."""
        return np.array(self.is_latent & self.mask)

    def pass_mask(self, start: int, end: int, dtype: mx.Dtype) -> mx.array:
        """What the queries in columns start..end may see, see `additive_mask`."""
        return additive_mask(self.mask, start, end, dtype, self.segments)

    def without_latent(self, column: int, rows: mx.array) -> Self:
        """Without these rows' (B,) bool latent at this column: what follows it moves up."""
        rows = (rows & self.is_latent[:, column])[:, None]
        columns = mx.arange(self.ids.shape[1])[None]
        positions = mx.maximum(self.positions - (rows & (columns > column)), 0)
        mask = self.mask & ~(rows & (columns == column))
        return replace(self, mask=mask, positions=positions)
