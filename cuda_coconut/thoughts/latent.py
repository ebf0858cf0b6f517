"""The latent passes: what makes this Coconut.

    pass 0        columns [0, m)         the questions, up to each <|start-latent|>
    pass i < R    column m + i - 1       one thought: the state at the column before it
    pass R        columns [m + R - 1, T) the last thought and everything behind it

m is the first latent's column, R the largest number of latents. Every column is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from coconut.batches.batch import Batch
from cuda_coconut.models.base import Key, Mask, additive_mask, split_key, to_device
from cuda_coconut.models.cache import SegmentCache
from cuda_coconut.thoughts.feedback import prepare, think
from cuda_coconut.thoughts.thinker import Thinker


@dataclass
class Inputs:
    """The arrays of a Batch that a forward pass reads; shapes: coconut/batches/batch.py."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    is_latent: torch.Tensor
    pads_left: bool = True
    """Some row begins with a pad. If none does, the causal rule alone hides every pad."""
    segments: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str = "cpu") -> Inputs:
        """Copy from the host."""
        # twin: torch wants to know the device; MLX has one for all.
        arrays = (batch.ids, batch.mask, batch.positions, batch.is_latent)
        segments = None if batch.segments is None else to_device(batch.segments, device)
        pads_left = not batch.mask[:, 0].all()
        return cls(*(to_device(a, device) for a in arrays), pads_left, segments)


@dataclass
class LatentOutput:
    """hidden (B, T, D) after the final norm; thoughts: R arrays (B, D) as fed back; the cache.

    inputs: as given, or without the latents that a row was spared.
    """

    hidden: torch.Tensor
    thoughts: list[torch.Tensor]
    cache: SegmentCache
    inputs: Inputs


def latent_forward(
    model,
    inputs: Inputs,
    first_latent: int,
    n_passes: int,
    key: Key | None = None,
    checkpointing: bool = False,
    replaced: torch.Tensor | None = None,
    prepared: dict[str, torch.Tensor] | None = None,
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

    def run(x: torch.Tensor, start: int, end: int, i: int) -> torch.Tensor:
        mask = pass_mask(inputs, start, end, x.dtype)
        positions = inputs.positions[:, start:end]
        tap = thinker.watch(x, positions) if thinker and i < n_passes else None
        return model.trunk(x, positions, mask, cache, keys[i], checkpointing, tap)

    # Split once: the gradient of each slice would be as large as the whole.
    sizes = [first_latent, *[1] * (n_passes - 1), T - first_latent - n_passes + 1]
    pieces = embedded.split(sizes if n_passes else T, dim=1)
    end = pieces[0].shape[1]
    hidden, thoughts = [run(pieces[0], 0, end, 0)], []
    for i in range(1, n_passes + 1):
        # ln_f's output, not the residual stream: published checkpoints were trained on it.
        thought = hidden[-1][:, -1]
        if replaced is not None:
            thought = replaced[i - 1].to(thought.dtype)
        elif thinker:
            has_stopped = thinker.has_stopped
            thought = think(thinker, thought, i - 1)
            if has_stopped is not None:
                inputs = without_latent(inputs, end, has_stopped)
        start, end = end, end + pieces[i].shape[1]
        x = torch.where(inputs.is_latent[:, start, None], thought, pieces[i][:, 0])
        x = torch.cat([x[:, None], pieces[i][:, 1:]], dim=1)
        hidden.append(run(x, start, end, i))
        thoughts.append(thought)
    joined = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
    return LatentOutput(joined, thoughts, cache, inputs)


def without_latent(inputs: Inputs, column: int, rows: torch.Tensor) -> Inputs:
    """Inputs in which these rows (B,) bool have no latent at this column: what follows moves up."""
    rows = (rows & inputs.is_latent[:, column])[:, None]
    columns = torch.arange(inputs.ids.shape[1], device=rows.device)[None]
    positions = (inputs.positions - (rows & (columns > column)).int()).clamp(min=0)
    mask = inputs.mask & ~(rows & (columns == column))
    # The hole is a pad like those on the left: the causal rule alone would show it.
    return replace(inputs, mask=mask, positions=positions, pads_left=True)


@torch.inference_mode()
def thoughts_of(model, batch: Batch, n_passes: int) -> np.ndarray:
    """What the latents of a batch receive, thought by thought: (n_passes, B, D) float32."""
    inputs = Inputs.of(batch, next(model.parameters()).device)
    prepared = prepare(model, batch, (0,)) if n_passes else None
    plan = (batch.first_latent, n_passes)
    state = latent_forward(model, inputs, *plan, prepared=prepared)
    shape = (0, len(batch.ids), state.hidden.shape[-1])
    thoughts = torch.stack(state.thoughts) if n_passes else torch.zeros(shape)
    return thoughts.float().cpu().numpy()


def pass_mask(inputs: Inputs, start: int, end: int, dtype: torch.dtype) -> Mask:
    """What the queries in columns start..end may see, in the cheapest form that says so."""
    # twin: the fused kernels of torch skip the hidden half only when told "causal".
    if not inputs.pads_left and inputs.segments is None and start == 0:
        return "causal"
    if not inputs.pads_left and inputs.segments is None and end - start == 1:
        return None
    return additive_mask(inputs.mask, start, end, dtype, inputs.segments)
