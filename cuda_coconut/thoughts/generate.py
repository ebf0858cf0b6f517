"""Batched decoding: one cache from the question through the latents to the last token."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding, Outputs
from coconut.batches.results import Sampled
from coconut.blocks import NEVER
from coconut.feedback.attached import prepare
from cuda_coconut.models.arrays import queues, to_device
from cuda_coconut.models.base import without_gradients
from cuda_coconut.models.cache import DecodeCache
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.latent import LatentOutput, latent_forward

COMPACT_AT = 0.75
"""Rows that ended leave the batch once fewer than this share are still writing; moving the cache
for each single row would cost more than it saves."""

LOOK_EVERY = 8
"""Tokens between two looks of the host on a GPU, each of which waits for all that is queued. What a
row writes behind its end until then is dropped. A CPU queues nothing: there it looks at each."""


def generate(
    model,
    batch: Batch,
    n_passes: int,
    decoding: Decoding,
    replaced: np.ndarray | None = None,
    watch: Callable[[LatentOutput], None] | None = None,
) -> list[list[int]]:
    """New tokens of every row; a row ends with eos (kept), at max_new_tokens or at its own last
    position.

    batch: prompts as collated; rows may hold different numbers of latents. n_passes 0 treats
    latents as ordinary tokens. Every token is tested for eos, the first one too. replaced
    (n_passes, B, D): thoughts to feed back instead of the model's own. watch: is shown the latent
    phase.
    """
    source = np.arange(len(batch.ids))
    streams = [(int(i),) for i in batch.idx]
    rows = sample(model, batch, n_passes, decoding, source, streams, replaced, watch)
    return [row.tokens for row in rows]


@without_gradients
def sample(
    model,
    batch: Batch,
    n_passes: int,
    decoding: Decoding,
    source: np.ndarray,
    streams: Sequence[tuple[int, ...]],
    replaced: np.ndarray | None = None,
    watch: Callable[[LatentOutput], None] | None = None,
) -> list[Sampled]:
    """New tokens of any number of rows a prompt; each prompt is read once.

    source (R,): the prompt of each row, a number of a row of the batch. streams: R tuples of whole
    numbers; with decoding.seed they name a row's random draws, so batch mates change nothing.
    replaced, watch: as for `generate`.
    """
    device = next(model.parameters()).device
    if replaced is not None and replaced.shape[:2] != (n_passes, len(batch.ids)):
        raise ValueError(f"thoughts {replaced.shape}: expected ({n_passes}, {len(batch.ids)}, D)")
    given = None if replaced is None else to_device(replaced, device)
    inputs = Inputs.of(batch, device)
    prepared = prepare(model, batch, (decoding.seed,), decoding=True) if n_passes else None
    plan = (batch.first_latent, n_passes)
    state = latent_forward(model, inputs, *plan, replaced=given, prepared=prepared)
    if watch:
        watch(state)
    mask, numbers = batch.mask, batch.positions
    if state.inputs is not inputs:  # some rows were spared latents
        mask, numbers = (a.cpu().numpy() for a in (state.inputs.mask, state.inputs.positions))
    T = batch.ids.shape[1]
    last = (T - 1 - np.argmax(batch.mask[:, ::-1], axis=1))[source]
    hidden = state.hidden[to_device(source, device), to_device(last, device)]
    # Only real tokens are keys: a pad behind a short prompt must stay unseen.
    pads = ~mask[source]
    seen = to_device(pads.astype(np.float32) * NEVER, device) if pads.any() else None
    cache = DecodeCache(state.cache, source, model.shares_prompts)
    del state
    lengths = numbers[source, last] + 1
    outputs = Outputs(decoding, lengths)
    positions = to_device(lengths, device)
    drawn = to_device(decoding.uniforms(streams), device) if decoding.temperature else None
    every = LOOK_EVERY if queues(positions) else 1
    unread: list[tuple[torch.Tensor, ...]] = []
    for n_done in range(1, decoding.max_new_tokens + 1):
        uniforms = None if drawn is None else drawn[:, n_done - 1]
        unread.append(_pick(model.head(hidden), uniforms, decoding.temperature))
        tokens = unread[-1][0]
        if len(unread) == every or n_done == decoding.max_new_tokens:
            outputs.add(*_read(unread))
            unread = []
            if outputs.are_complete or n_done == decoding.max_new_tokens:
                break
            if (keep := outputs.leave(COMPACT_AT)) is not None:
                cache.keep(keep)
                index = to_device(keep, device)
                tokens, positions = tokens[index], positions[index]
                seen = None if seen is None else seen[index]
                drawn = None if drawn is None else drawn[index]
        x, mask = model.embed(tokens[:, None]), None
        if seen is not None:
            seen = torch.cat([seen, seen.new_zeros((len(seen), 1))], dim=1)
            mask = seen[:, None, None].to(x.dtype)
        hidden = model.trunk(x, positions[:, None], mask, cache)[:, 0]
        # A row behind its end is not read; the model may have no further position for it.
        positions = (positions + 1).clamp(max=decoding.last_position)
    return outputs.sampled


def _pick(
    logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, ...]:
    """The likeliest tokens (B,) from logits (B, V); or drawn ones and their log-probabilities.

    Drawn by the inverse of the distribution function: one number (B,) of the host a token, so that
    both twins draw alike.
    """
    if uniforms is None:
        return (logits.argmax(dim=-1),)
    p = (logits.float() / temperature).softmax(dim=-1)
    total = p.cumsum(dim=-1)
    tokens = (total <= uniforms[:, None] * total[:, -1:]).sum(dim=-1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, p.gather(1, tokens[:, None])[:, 0].log()


def _read(unread: Sequence[tuple[torch.Tensor, ...]]) -> list[np.ndarray]:
    """Tokens (N, B), and log-probabilities of drawn ones, on the host: the one wait."""
    # float64 holds both as they are.
    steps = torch.stack([torch.stack([a.double() for a in step]) for step in unread])
    return list(steps.cpu().numpy().swapaxes(0, 1))
