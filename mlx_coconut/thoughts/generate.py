"""Batched decoding: one cache from the question through the latents to the last token."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from coconut.backend import Decoding
from coconut.batches.batch import Batch
from coconut.batches.results import Sampled
from coconut.blocks import NEVER
from coconut.feedback.attached import prepare
from mlx_coconut.models.cache import DecodeCache
from mlx_coconut.models.cpu import softmax
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import LatentOutput, latent_forward

COMPACT_AT = 0.75
"""Rows that ended leave the batch once fewer than this share are still writing; moving the cache
for each single row would cost more than it saves."""


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
    seen = mx.array((~mask[source]).astype(np.float32) * NEVER)
    cache = DecodeCache(state.cache, source, model.shares_prompts)
    del state
    positions = numbers[source, last]
    uniforms = decoding.uniforms(streams)
    out = [Sampled([], []) for _ in source]
    room = decoding.room(positions + 1)
    rows, ended = np.arange(len(out)), room < 1
    for n_done in range(decoding.max_new_tokens):
        picked = _pick(model.head(hidden), uniforms[rows, n_done], decoding)
        tokens, logprobs = (np.array(x) for x in picked)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if not ended[row]:
                out[row].tokens.append(int(token))
                out[row].logprobs.append(float(logprob))
                is_full = len(out[row].tokens) == room[row]
                ended[row] = decoding.ends(out[row].tokens) or is_full
        writing = ~ended[rows]
        if not writing.any() or n_done + 1 == decoding.max_new_tokens:
            break
        if writing.mean() < COMPACT_AT:
            keep = np.flatnonzero(writing)
            rows, tokens, positions = rows[keep], tokens[keep], positions[keep]
            cache.keep(keep)
            seen = seen[mx.array(keep)]
        # A row that ended goes nowhere: the model may have no further position for it.
        positions = positions + ~ended[rows]
        seen = mx.concatenate([seen, mx.zeros((len(rows), 1))], axis=1)
        x = model.embed(mx.array(tokens)[:, None])
        mask = seen[:, None, None].astype(x.dtype)
        hidden = model.trunk(x, mx.array(positions)[:, None], mask, cache)[:, 0]
    return out


def _pick(logits: mx.array, uniforms: np.ndarray, decoding: Decoding) -> tuple[mx.array, mx.array]:
    """Greedy or sampled tokens (B,) from logits (B, V), and their log-probabilities.

    Sampled by the inverse of the distribution function: one number of the host a token, so that
    both twins draw alike.
    """
    logits = logits.astype(mx.float32)
    if decoding.temperature == 0:
        return mx.argmax(logits, axis=-1), mx.zeros(len(logits))
    p = softmax(logits / decoding.temperature)
    total = mx.cumsum(p, axis=-1)
    tokens = (total <= mx.array(uniforms)[:, None] * total[:, -1:]).sum(axis=-1)
    tokens = mx.minimum(tokens, logits.shape[-1] - 1)
    return tokens, mx.log(mx.take_along_axis(p, tokens[:, None], axis=-1)[:, 0])
