"""Batched decoding: one cache from the question through the latents to the last token."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from coconut.backend import Decoding
from coconut.batch import Batch
from mlx_coconut.cache import DecodeCache
from mlx_coconut.latent import Inputs, latent_forward
from mlx_coconut.models.base import NEVER

COMPACT_AT = 0.75
"""Rows that ended leave the batch once fewer than this share are still writing; moving the cache
for each single row would cost more than it saves."""


def generate(model, batch: Batch, n_passes: int, decoding: Decoding) -> list[list[int]]:
    """New tokens of every row; a row ends with eos (kept) or at max_new_tokens.

    batch: prompts as collated; rows may hold different numbers of latents. n_passes 0 treats
    latents as ordinary tokens. Every token is tested for eos, the first one too.
    """
    out: list[list[int]] = [[] for _ in batch.ids]
    state = latent_forward(model, Inputs.of(batch), batch.first_latent, n_passes)
    T = batch.ids.shape[1]
    last = T - 1 - np.argmax(batch.mask[:, ::-1], axis=1)
    hidden = state.hidden[mx.arange(len(out)), mx.array(last)]
    # Only real tokens are keys: a pad behind a short prompt must stay unseen.
    seen = mx.array((~batch.mask).astype(np.float32) * NEVER)
    cache = DecodeCache(state.cache)
    del state
    positions = batch.positions[np.arange(len(out)), last]
    rows = np.arange(len(out))
    for n_done in range(decoding.max_new_tokens):
        tokens = np.array(_pick(model.head(hidden), batch.idx[rows], n_done, decoding))
        for row, token in zip(rows, tokens, strict=True):
            if not out[row] or out[row][-1] != decoding.eos_id:
                out[row].append(int(token))
        writing = np.array([out[row][-1] != decoding.eos_id for row in rows])
        if not writing.any() or n_done + 1 == decoding.max_new_tokens:
            break
        if writing.mean() < COMPACT_AT:
            keep = np.flatnonzero(writing)
            rows, tokens, positions = rows[keep], tokens[keep], positions[keep]
            cache.keep(mx.array(keep))
            seen = seen[mx.array(keep)]
        positions = positions + 1
        seen = mx.concatenate([seen, mx.zeros((len(rows), 1))], axis=1)
        x = model.embed(mx.array(tokens)[:, None])
        mask = seen[:, None, None].astype(x.dtype)
        hidden = model.trunk(x, mx.array(positions)[:, None], mask, cache)[:, 0]
    return out


def _pick(logits: mx.array, idx: np.ndarray, n_done: int, decoding: Decoding) -> mx.array:
    """Greedy or sampled tokens (B,) from logits (B, V)."""
    logits = logits.astype(mx.float32)
    if decoding.temperature == 0:
        return mx.argmax(logits, axis=-1)
    # A stream a row, so that batch mates and order do not change what a question is answered.
    seeds = [np.random.SeedSequence([decoding.seed, int(i), n_done]) for i in idx]
    noise = np.stack([np.random.default_rng(s).gumbel(size=logits.shape[-1]) for s in seeds])
    return mx.argmax(logits / decoding.temperature + mx.array(noise.astype(np.float32)), axis=-1)


if __name__ == "__main__":
    from coconut.ask import main
    from mlx_coconut.run import make_backend

    main("mlx_coconut", make_backend)
