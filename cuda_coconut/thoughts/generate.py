"""Batched decoding: one cache from the question through the latents to the last token."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from coconut.backend import Decoding
from coconut.batches.batch import Batch
from coconut.batches.results import Sampled
from coconut.blocks import NEVER
from coconut.feedback.attached import prepare
from cuda_coconut.models.arrays import to_device
from cuda_coconut.models.cache import DecodeCache
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.latent import LatentOutput, latent_forward

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


@torch.inference_mode()
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
    seen = to_device((~mask[source]).astype(np.float32) * NEVER, device)
    cache = DecodeCache(state.cache, source, model.shares_prompts)
    del state
    positions = numbers[source, last]
    uniforms = decoding.uniforms(streams)
    out = [Sampled([], []) for _ in source]
    room = decoding.room(positions + 1)
    rows, ended = np.arange(len(out)), room < 1
    for n_done in range(decoding.max_new_tokens):
        picked = _pick(model.head(hidden), uniforms[rows, n_done], decoding)
        tokens, logprobs = (x.cpu().numpy() for x in picked)
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
            seen = seen[to_device(keep, device)]
        # A row that ended goes nowhere: the model may have no further position for it.
        positions = positions + ~ended[rows]
        seen = torch.cat([seen, seen.new_zeros((len(rows), 1))], dim=1)
        x = model.embed(to_device(tokens, device)[:, None])
        mask = seen[:, None, None].to(x.dtype)
        hidden = model.trunk(x, to_device(positions, device)[:, None], mask, cache)[:, 0]
    return out


def _pick(
    logits: torch.Tensor, uniforms: np.ndarray, decoding: Decoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy or sampled tokens (B,) from logits (B, V), and their log-probabilities.

    Sampled by the inverse of the distribution function: one number of the host a token, so that
    both twins draw alike.
    """
    logits = logits.float()
    if decoding.temperature == 0:
        return logits.argmax(dim=-1), logits.new_zeros(len(logits))
    p = (logits / decoding.temperature).softmax(dim=-1)
    total = p.cumsum(dim=-1)
    tokens = (total <= to_device(uniforms, p.device)[:, None] * total[:, -1:]).sum(dim=-1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens, p.gather(1, tokens[:, None])[:, 0].log()
