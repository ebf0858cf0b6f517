"""Sums over the thoughts of an evaluation, and their means."""

import math
from collections.abc import Mapping

import numpy as np

# ---- what thoughts look like


class ThoughtStatistics:
    """Means over rows of what the twins measure of thoughts, one number a latent."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, measured: Mapping[str, np.ndarray], is_latent: np.ndarray) -> None:
        """measured: name -> (R, B); is_latent (B, R): which rows have the latent. NaN: no value."""
        for name, values in measured.items():
            counts = is_latent.T & np.isfinite(values)
            self._add(name, np.where(counts, values, 0).sum(axis=1), counts.sum(axis=1))

    def add_rank(self, thoughts: np.ndarray, is_latent: np.ndarray) -> None:
        """Effective rank of each latent's thoughts (R, B, D) over the rows that have it.

        exp of the entropy of the singular values of the centred thoughts (Roy and Vetterli 2007).
        """
        ranks, counts = np.zeros(len(thoughts)), np.zeros(len(thoughts))
        for i, (a, has) in enumerate(zip(thoughts, is_latent.T, strict=True)):
            if has.sum() > 1:
                s = np.linalg.svd(a[has] - a[has].mean(axis=0), compute_uv=False)
                p = s / s.sum() if s.sum() else np.ones(1)
                ranks[i] = math.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
                counts[i] = 1
        self._add("effective_rank", ranks, counts)

    def _add(self, name: str, sums: np.ndarray, counts: np.ndarray) -> None:
        for store, values in ((self._sums, sums), (self._counts, counts)):
            old = store.get(name, np.zeros(0))
            total = np.zeros(max(len(old), len(values)))
            total[: len(old)] += old
            total[: len(values)] += values
            store[name] = total

    def means(self) -> dict[str, list[float | None]]:
        """Name -> a mean for each latent, None where no row had a value."""
        return {
            name: [
                round(float(s / c), 6) if c else None
                for s, c in zip(sums, self._counts[name], strict=True)
            ]
            for name, sums in self._sums.items()
        }
