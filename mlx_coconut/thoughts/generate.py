"""Batched decoding: one cache from the question through the latents to the last token."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding, Outputs
from coconut.batches.results import Sampled
from coconut.blocks import NEVER
from coconut.feedback.attached import prepare
from mlx_coconut.models.arrays import queues
from mlx_coconut.models.cache import DecodeCache
from mlx_coconut.models.cpu import softmax
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import LatentOutput, latent_forward

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
    if replaced is not None and replaced.shape[:2] != (n_passes, len(batch.ids)):
        raise ValueError(f"thoughts {replaced.shape}: expected ({n_passes}, {len(batch.ids)}, D)")
    given = None if replaced is None else mx.array(replaced)
    inputs = Inputs.of(batch)
    prepared = prepare(model, batch, (decoding.seed,), decoding=True) if n_passes else None
    plan = (batch.first_latent, n_passes)
    state = latent_forward(model, inputs, *plan, replaced=given, prepared=prepared)
    if watch:
        watch(state)
    mask, numbers = batch.mask, batch.positions
    if state.inputs is not inputs:  # some rows were spared latents
        mask, numbers = np.array(state.inputs.mask), np.array(state.inputs.positions)
    T = batch.ids.shape[1]
    last = (T - 1 - np.argmax(batch.mask[:, ::-1], axis=1))[source]
    hidden = state.hidden[mx.array(source), mx.array(last)]
    # Only real tokens are keys: a pad behind a short prompt must stay unseen.
    pads = ~mask[source]
    seen = mx.array(pads.astype(np.float32) * NEVER) if pads.any() else None
    cache = DecodeCache(state.cache, source, model.shares_prompts)
    del state
    lengths = numbers[source, last] + 1
    outputs = Outputs(decoding, lengths)
    positions = mx.array(lengths)
    drawn = mx.array(decoding.uniforms(streams)) if decoding.temperature else None
    every = LOOK_EVERY if queues(positions) else 1
    unread: list[tuple[mx.array, ...]] = []
    for n_done in range(1, decoding.max_new_tokens + 1):
        uniforms = None if drawn is None else drawn[:, n_done - 1]
        unread.append(_pick(model.head(hidden), uniforms, decoding.temperature))
        tokens = unread[-1][0]
        mx.async_eval(*unread[-1])
        if len(unread) == every or n_done == decoding.max_new_tokens:
            outputs.add(*_read(unread))
            unread = []
            if outputs.are_complete or n_done == decoding.max_new_tokens:
                break
            if (keep := outputs.leave(COMPACT_AT)) is not None:
                cache.keep(keep)
                index = mx.array(keep)
                tokens, positions = tokens[index], positions[index]
                seen = None if seen is None else seen[index]
                drawn = None if drawn is None else drawn[index]
        x, mask = model.embed(tokens[:, None]), None
        if seen is not None:
            seen = mx.concatenate([seen, mx.zeros((len(seen), 1))], axis=1)
            mask = seen[:, None, None].astype(x.dtype)
        hidden = model.trunk(x, positions[:, None], mask, cache)[:, 0]
        # A row behind its end is not read; the model may have no further position for it.
        positions = mx.minimum(positions + 1, decoding.last_position)
    return outputs.sampled


def _pick(logits: mx.array, uniforms: mx.array | None, temperature: float) -> tuple[mx.array, ...]:
    """The likeliest tokens (B,) from logits (B, V); or drawn ones and their log-probabilities.

    Drawn by the inverse of the distribution function: one number (B,) of the host a token, so that
    both twins draw alike.
    """
    if uniforms is None:
        return (mx.argmax(logits, axis=-1),)
    p = softmax(logits.astype(mx.float32) / temperature)
    total = mx.cumsum(p, axis=-1)
    tokens = (total <= uniforms[:, None] * total[:, -1:]).sum(axis=-1)
    tokens = mx.minimum(tokens, logits.shape[-1] - 1)
    return tokens, mx.log(mx.take_along_axis(p, tokens[:, None], axis=-1)[:, 0])


def _read(unread: Sequence[tuple[mx.array, ...]]) -> list[np.ndarray]:
    """Tokens (N, B), and log-probabilities of drawn ones, on the host: the one wait."""
    steps = [mx.stack(list(of_all)) for of_all in zip(*unread, strict=True)]
    mx.eval(*steps)
    return [np.array(a) for a in steps]
