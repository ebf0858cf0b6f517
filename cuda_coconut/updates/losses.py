"""Losses as (sum, count): sums add up over micro-batches, means do not."""

import torch
import torch.nn.functional as F


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy in nats and the number of targets it is summed over.

    logits (N, V), targets (N,) int, weights (N,) 0 or 1. Computed in float32; all weights 0 give
    (0, 0), not NaN.
    """
    nats = F.cross_entropy(logits.float(), targets.long(), reduction="none")
    return (nats * weights).sum(), weights.sum()
