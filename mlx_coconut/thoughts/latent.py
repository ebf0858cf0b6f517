"""The latent passes: what makes this Coconut.

    pass 0        columns [0, m)         the questions, up to each <|start-latent|>
    pass i < R    column m + i - 1       one thought: the state at the column before it
    pass R        columns [m + R - 1, T) the last thought and everything behind it

Where rows begin alike, what they have in common is read before, once for all of them.

m is the first latent's column, R the largest number of latents. Every column is computed once.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from coconut.batches.batch import Batch
from coconut.feedback.attached import prepare
from coconut.feedback.thinking import thinker_for
from mlx_coconut.models import arrays
from mlx_coconut.models.base import Key, split_key
from mlx_coconut.models.cache import SegmentCache
from mlx_coconut.thoughts.inputs import Inputs


@dataclass
class LatentOutput:
    """hidden (B, T, D) after the final norm; thoughts: R arrays (B, D) as fed back; the cache.

    inputs: as given, or without the latents that a row was spared.
    """

    hidden: mx.array
    thoughts: list[mx.array]
    cache: SegmentCache
    inputs: Inputs

    def thoughts_on_host(self) -> np.ndarray:
        """The thoughts (R, B, D) float32."""
        B, _, D = self.hidden.shape
        thoughts = mx.stack(self.thoughts) if self.thoughts else mx.zeros((0, B, D))
        return np.array(thoughts.astype(mx.float32))


def latent_forward(
    model,
    inputs: Inputs,
    first_latent: int,
    n_passes: int,
    key: Key = None,
    checkpointing: bool = False,
    replaced: mx.array | None = None,
    prepared: dict[str, mx.array] | None = None,
) -> LatentOutput:
    """Hidden states of a batch, with every latent's input replaced by the thought before it.

    A thought is the last state of the column before, or what model.feedback makes of that column.

    first_latent, n_passes: the batch's plan; n_passes 0 is the plain model, latents included as
    ordinary tokens. key: turns dropout on. Gradients flow through all passes and the cache.
    checkpointing: blocks are recomputed in the backward pass instead of kept. replaced (R, B, D):
    thoughts to feed back instead of the model's own. prepared: what `attached.prepare` made of the
    batch, for rules that need it. A beginning that rows share is read without dropout.
    """
    thinker = thinker_for(arrays, model, replaced, prepared)
    cache = SegmentCache(len(model.layers))
    keys = split_key(key, n_passes + 1)
    hidden, end = [], 0
    if inputs.beginning is not None:
        hidden.append(_begin(model, inputs, cache, checkpointing))
        end = inputs.beginning.width

    def run(x: mx.array, start: int, end: int, i: int) -> mx.array:
        positions = inputs.positions[:, start:end]
        mask = inputs.pass_mask(start, end, x.dtype)
        tap = thinker.watch(x, positions) if i < n_passes else None
        return model.trunk(x, positions, mask, cache, keys[i], checkpointing, tap)

    T, start, embedded = inputs.ids.shape[1], end, model.embed(inputs.ids)
    end = first_latent if n_passes else T
    hidden.append(run(embedded[:, start:end], start, end, 0))
    thoughts = []
    for i in range(1, n_passes + 1):
        # ln_f's output, not the residual stream: published checkpoints were trained on it.
        thought = thinker.think(hidden[-1][:, -1], i - 1)
        inputs = thinker.spare(inputs, end)
        start, end = end, T if i == n_passes else end + 1
        chosen = inputs.is_latent[:, start, None].astype(thought.dtype)
        x = embedded[:, start] * (1 - chosen) + thought * chosen
        x = mx.concatenate([x[:, None], embedded[:, start + 1 : end]], axis=1)
        hidden.append(run(x, start, end, i))
        thoughts.append(thought)
    joined = hidden[0] if len(hidden) == 1 else mx.concatenate(hidden, axis=1)
    return LatentOutput(joined, thoughts, cache, inputs)


def _begin(model, inputs: Inputs, cache: SegmentCache, checkpointing: bool) -> mx.array:
    """Hidden states (B, width, D) of what rows have in common; its keys are in the cache then."""
    source, begun = inputs.beginning.source, inputs.begun()
    x = model.embed(begun.ids)
    mask = begun.pass_mask(0, x.shape[1], x.dtype)
    hidden = model.trunk(x, begun.positions, mask, cache, None, checkpointing)
    cache.go_on(source)
    return hidden[arrays.from_host(source, hidden)]


def thoughts_of(model, batch: Batch, n_passes: int) -> np.ndarray:
    """What the latents of a batch receive, thought by thought: (n_passes, B, D) float32."""
    prepared = prepare(model, batch, (0,)) if n_passes else None
    plan, inputs = (batch.first_latent, n_passes), Inputs.of(batch)
    return latent_forward(model, inputs, *plan, prepared=prepared).thoughts_on_host()
