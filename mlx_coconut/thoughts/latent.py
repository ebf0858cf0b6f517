"""The latent passes: what makes this Coconut.

    pass 0        columns [0, m)         the questions, up to each <|start-latent|>
    pass i < R    column m + i - 1       one thought: the state at the column before it
    pass R        columns [m + R - 1, T) the last thought and everything behind it

m is the first latent's column, R the largest number of latents. Every column is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from coconut.batches.batch import Batch
from mlx_coconut.models.base import additive_mask, split_key
from mlx_coconut.models.cache import SegmentCache
from mlx_coconut.thoughts.feedback import prepare, think
from mlx_coconut.thoughts.thinker import Thinker


@dataclass
class Inputs:
    """The arrays of a Batch that a forward pass reads; shapes: coconut/batches/batch.py."""

    ids: mx.array
    mask: mx.array
    positions: mx.array
    is_latent: mx.array
    segments: mx.array | None = None

    @classmethod
    def of(cls, batch: Batch) -> Inputs:
        """Copy from the host."""
        segments = None if batch.segments is None else mx.array(batch.segments)
        arrays = map(mx.array, (batch.ids, batch.mask, batch.positions, batch.is_latent))
        return cls(*arrays, segments)


@dataclass
class LatentOutput:
    """hidden (B, T, D) after the final norm; thoughts: R arrays (B, D) as fed back; the cache.

    inputs: as given, or without the latents that a row was spared.
    """

    hidden: mx.array
    thoughts: list[mx.array]
    cache: SegmentCache
    inputs: Inputs


def latent_forward(
    model,
    inputs: Inputs,
    first_latent: int,
    n_passes: int,
    key: mx.array | None = None,
    checkpointing: bool = False,
    replaced: mx.array | None = None,
    prepared: dict[str, mx.array] | None = None,
) -> LatentOutput:
    """Hidden states of a batch, with every latent's input replaced by the thought before it.

    The thought is what model.feedback makes of the column before; without one, its last state.

    first_latent, n_passes: the batch's plan; n_passes 0 is the plain model, latents included as
    ordinary tokens. key: turns dropout on. Gradients flow through all passes and the cache.
    checkpointing: blocks are recomputed in the backward pass instead of kept. replaced (R, B, D):
    thoughts to feed back instead of the model's own. prepared: what `feedback.prepare` made of the
    batch, for rules that need it.
    """
    embedded = model.embed(inputs.ids)
    T = inputs.ids.shape[1]
    cache = SegmentCache(len(model.layers))
    keys = split_key(key, n_passes + 1)
    thinker = None if model.feedback is None else Thinker(model, prepared)

    def run(x: mx.array, start: int, end: int, i: int) -> mx.array:
        mask = additive_mask(inputs.mask, start, end, x.dtype, inputs.segments)
        positions = inputs.positions[:, start:end]
        tap = thinker.watch(x, positions) if thinker and i < n_passes else None
        return model.trunk(x, positions, mask, cache, keys[i], checkpointing, tap)

    end = first_latent if n_passes else T
    hidden, thoughts = [run(embedded[:, :end], 0, end, 0)], []
    for i in range(1, n_passes + 1):
        # ln_f's output, not the residual stream: published checkpoints were trained on it.
        thought = hidden[-1][:, -1]
        if replaced is not None:
            thought = replaced[i - 1].astype(thought.dtype)
        elif thinker:
            has_stopped = thinker.has_stopped
            thought = think(thinker, thought, i - 1)
            if has_stopped is not None:
                inputs = without_latent(inputs, end, has_stopped)
        start, end = end, T if i == n_passes else end + 1
        chosen = inputs.is_latent[:, start, None].astype(thought.dtype)
        x = embedded[:, start] * (1 - chosen) + thought * chosen
        x = mx.concatenate([x[:, None], embedded[:, start + 1 : end]], axis=1)
        hidden.append(run(x, start, end, i))
        thoughts.append(thought)
    joined = hidden[0] if len(hidden) == 1 else mx.concatenate(hidden, axis=1)
    return LatentOutput(joined, thoughts, cache, inputs)


def without_latent(inputs: Inputs, column: int, rows: mx.array) -> Inputs:
    """Inputs in which these rows (B,) bool have no latent at this column: what follows moves up."""
    rows = (rows & inputs.is_latent[:, column])[:, None]
    columns = mx.arange(inputs.ids.shape[1])[None]
    positions = mx.maximum(inputs.positions - (rows & (columns > column)), 0)
    mask = inputs.mask & ~(rows & (columns == column))
    return replace(inputs, mask=mask, positions=positions)


def thoughts_of(model, batch: Batch, n_passes: int) -> np.ndarray:
    """What the latents of a batch receive, thought by thought: (n_passes, B, D) float32."""
    prepared = prepare(model, batch, (0,)) if n_passes else None
    plan = (batch.first_latent, n_passes)
    state = latent_forward(model, Inputs.of(batch), *plan, prepared=prepared)
    shape = (0, len(batch.ids), state.hidden.shape[-1])
    thoughts = mx.stack(state.thoughts) if n_passes else mx.zeros(shape)
    return np.array(thoughts.astype(mx.float32))
