"""What a rule draws on the host for a batch: noise, dropped numbers, partners."""

from collections.abc import Callable, Sequence

import numpy as np

from coconut.batches.batch import Batch
from coconut.errors import UserError
from coconut.feedback.rules import Rule

# ---- what the host makes for a batch

NOISE, DROPOUT, PARTNERS = 1, 2, 3
"""Kinds of draws, so that no two share a stream."""


def prepare(
    rule: Rule,
    batch: Batch,
    width: int,
    key: Sequence[int],
    training: bool,
    progress: float = 0.0,
    decoding: bool = False,
) -> dict[str, np.ndarray]:
    """Arrays that a rule needs beside the states; empty for most rules.

    noise (R, B, D): sigma times standard normal, drawn from (key, row, latent), so that it depends
    neither on batch mates nor on the twin. kept (R, B, H): mlp_plain's dropout. partners (R, B):
    whose state `shuffle` gives. may_stop (): rows that are sure may end their latents, when
    decoding. key: numbers that name the update. progress: share of the run that is done. Raises
    UserError if a row to be shuffled is alone.
    """
    R = batch.n_passes
    out: dict[str, np.ndarray] = {}

    def draws(kind: int, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        return np.array(
            [
                [draw(np.random.default_rng([*key, int(row), i, kind])) for row in batch.idx]
                for i in range(R)
            ]
        )

    if not R:
        return out
    noise, plain, shuffled = rule.noise, rule.find("mlp_plain"), rule.find("shuffle")
    if noise and (training or noise["when"] == "always"):
        sigma = noise["sigma"] * (1 - progress if noise["schedule"] == "linear" else 1)
        out["noise"] = draws(
            NOISE, lambda rng: np.float32(sigma) * rng.standard_normal(width, "f4")
        )
    if plain and plain["dropout"] and training:
        p = plain["dropout"]
        kept = draws(DROPOUT, lambda rng: rng.random(plain["hidden"], "f4") >= p)
        out["kept"] = (kept / (1 - p)).astype(np.float32)
    if shuffled:
        out["partners"] = np.array(
            [_partners(batch, i, shuffled["seed"]) for i in range(R)], np.int32
        )
    if decoding and rule.stop:
        out["may_stop"] = np.array(True)
    return out


def _partners(batch: Batch, i: int, seed: int) -> np.ndarray:
    """Another row for each; for rows that have the i-th latent another that has it, if any."""
    B = len(batch.idx)
    if B < 2:
        raise UserError(
            "feedback shuffle",
            "a batch of one row has no other row to take a state from; ask several questions at"
            " once, or change batch_size_training, eval_batch_size or the number of items",
        )
    rng = np.random.default_rng([seed, i, *map(int, batch.idx), PARTNERS])
    has = batch.is_latent[:, batch.first_latent + i]
    partners = (np.arange(B) + rng.integers(1, B)) % B
    rows = rng.permutation(np.flatnonzero(has))
    if len(rows) > 1:
        partners[rows] = np.roll(rows, 1)
    return partners
