"""Batched decoding: one cache from the question through the latents to the last token."""

from __future__ import annotations

import numpy as np
import torch

from coconut.backend import Decoding
from coconut.batch import Batch
from cuda_coconut.cache import DecodeCache
from cuda_coconut.latent import Inputs, latent_forward, to_device
from cuda_coconut.models.base import NEVER

COMPACT_AT = 0.75
"""Rows that ended leave the batch once fewer than this share are still writing; moving the cache
for each single row would cost more than it saves."""


@torch.inference_mode()
def generate(model, batch: Batch, n_passes: int, decoding: Decoding) -> list[list[int]]:
    """New tokens of every row; a row ends with eos (kept) or at max_new_tokens.

    batch: prompts as collated; rows may hold different numbers of latents. n_passes 0 treats
    latents as ordinary tokens. Every token is tested for eos, the first one too.
    """
    device = next(model.parameters()).device
    out: list[list[int]] = [[] for _ in batch.ids]
    state = latent_forward(model, Inputs.of(batch, device), batch.first_latent, n_passes)
    T = batch.ids.shape[1]
    last = T - 1 - np.argmax(batch.mask[:, ::-1], axis=1)
    hidden = state.hidden[to_device(np.arange(len(out)), device), to_device(last, device)]
    # Only real tokens are keys: a pad behind a short prompt must stay unseen.
    seen = to_device((~batch.mask).astype(np.float32) * NEVER, device)
    cache = DecodeCache(state.cache)
    del state
    positions = batch.positions[np.arange(len(out)), last]
    rows = np.arange(len(out))
    for n_done in range(decoding.max_new_tokens):
        tokens = _pick(model.head(hidden), batch.idx[rows], n_done, decoding).cpu().numpy()
        for row, token in zip(rows, tokens, strict=True):
            if not out[row] or out[row][-1] != decoding.eos_id:
                out[row].append(int(token))
        writing = np.array([out[row][-1] != decoding.eos_id for row in rows])
        if not writing.any() or n_done + 1 == decoding.max_new_tokens:
            break
        if writing.mean() < COMPACT_AT:
            keep = np.flatnonzero(writing)
            rows, tokens, positions = rows[keep], tokens[keep], positions[keep]
            cache.keep(to_device(keep, device))
            seen = seen[to_device(keep, device)]
        positions = positions + 1
        seen = torch.cat([seen, seen.new_zeros((len(rows), 1))], dim=1)
        x = model.embed(to_device(tokens, device)[:, None])
        mask = seen[:, None, None].to(x.dtype)
        hidden = model.trunk(x, to_device(positions, device)[:, None], mask, cache)[:, 0]
    return out


def _pick(logits: torch.Tensor, idx: np.ndarray, n_done: int, decoding: Decoding) -> torch.Tensor:
    """Greedy or sampled tokens (B,) from logits (B, V)."""
    logits = logits.float()
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    # A stream a row, so that batch mates and order do not change what a question is answered.
    seeds = [np.random.SeedSequence([decoding.seed, int(i), n_done]) for i in idx]
    noise = np.stack([np.random.default_rng(s).gumbel(size=logits.shape[-1]) for s in seeds])
    noise = to_device(noise.astype(np.float32), logits.device)
    return (logits / decoding.temperature + noise).argmax(dim=-1)


if __name__ == "__main__":
    from coconut.ask import main
    from cuda_coconut.run import make_backend

    main("cuda_coconut", make_backend)
