"""What a forward pass reads of a batch, on the device."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from coconut.batches.batch import Batch, Beginning
from cuda_coconut.models.arrays import to_device
from cuda_coconut.models.base import Mask, additive_mask


@dataclass
class Inputs:
    """The arrays of a Batch that a forward pass reads; shapes: coconut/batches/batch.py."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    is_latent: torch.Tensor
    pads_left: bool = True
    """Some row has a pad before a token. If none does, the causal rule alone hides every pad."""
    segments: torch.Tensor | None = None
    beginning: Beginning | None = None
    """What rows have in common; its arrays stay on the host."""

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str = "cpu") -> Self:
        """Copy from the host."""
        # twin: torch wants to know the device; MLX has one for all.
        arrays = (batch.ids, batch.mask, batch.positions, batch.is_latent)
        segments = None if batch.segments is None else to_device(batch.segments, device)
        pads_left = bool((batch.mask[:, 1:] > batch.mask[:, :-1]).any())
        return cls(*(to_device(a, device) for a in arrays), pads_left, segments, batch.beginning)

    def begun(self) -> Self:
        """The columns that rows have in common, a row for each beginning."""
        width, first = self.beginning.width, to_device(self.beginning.first, self.ids.device)
        arrays = (self.ids, self.mask, self.positions, self.is_latent)
        return type(self)(*(a[first, :width] for a in arrays), self.pads_left)

    def latents_on_host(self) -> np.ndarray:
        """(B, T) bool: which columns are latents of a row, spared ones left out."""
        return (self.is_latent & self.mask).cpu().numpy()

    def pass_mask(self, start: int, end: int, dtype: torch.dtype) -> Mask:
        """What the queries in columns start..end may see, see `additive_mask`."""
        # twin: the fused kernels of torch skip the hidden half only when told "causal".
        if not self.pads_left and self.segments is None and start == 0:
            return "causal"
        if not self.pads_left and self.segments is None and end - start == 1:
            return None
        return additive_mask(self.mask, start, end, dtype, self.segments)

    def without_latent(self, column: int, rows: torch.Tensor) -> Self:
        """Without these rows' (B,) bool latent at this column: what follows it moves up."""
        rows = (rows & self.is_latent[:, column])[:, None]
        columns = torch.arange(self.ids.shape[1], device=rows.device)[None]
        positions = (self.positions - (rows & (columns > column)).int()).clamp(min=0)
        mask = self.mask & ~(rows & (columns == column))
        # The hole is a pad like those on the left: the causal rule alone would show it.
        return replace(self, mask=mask, positions=positions, pads_left=True)
