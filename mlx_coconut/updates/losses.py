"""Losses as (sum, count): sums add up over micro-batches, means do not."""

import mlx.core as mx

from mlx_coconut.models.cpu import logsumexp


def masked_cross_entropy(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Summed cross-entropy in nats and the number of targets it is summed over.

    logits (N, V), targets (N,) int, weights (N,) 0 or 1. Computed in float32; all weights 0 give
    (0, 0), not NaN.
    """
    if not targets.size:  # logsumexp refuses an empty array
        return mx.array(0.0), mx.array(0.0)
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nats = logsumexp(logits) - picked
    return (nats * weights).sum(), weights.sum()
