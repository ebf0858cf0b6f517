"""The loss of rationales that are updated on more than once: clipped ratios, k3 and entropy.

    ratio   of a group: exp(sum of share * (log p - old)) over its tokens
    loss    - sum over groups of min(ratio * gain, clip(ratio) * gain)
            + sum over tokens of kl_weight * (exp(ref - log p) - (ref - log p) - 1)
            - sum over tokens of entropy_weight * entropy

A group is a token, or a whole rationale. Here the coefficients, on the host; the formula is
`surrogate_loss` of each twin's `updates/latro.py`.
Sources: Schulman et al. 2017 (clipping), 2020 (k3); Zheng et al. 2025 (the ratio of a sequence).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Surrogate:
    """Coefficients of a batch of N targets in G groups; those of answers and padding are 0.

    old (N,), ref (N,): log-probabilities when the rationales were drawn, and of the reference.
    share (N,), group (N,): of the token in its group's log-ratio. gain (G,): advantage times weight
    in the loss. kl_weight (N,), entropy_weight (N,). All float32 but group, int32.
    low, high: what ratios are clipped to. has_entropy: whether any is asked for.
    """

    old: np.ndarray
    ref: np.ndarray
    share: np.ndarray
    group: np.ndarray
    gain: np.ndarray
    kl_weight: np.ndarray
    entropy_weight: np.ndarray
    low: float
    high: float
    has_entropy: bool

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the device needs, in the order of the fields."""
        parts = (self.old, self.ref, self.share, self.group, self.gain)
        return (*parts, self.kl_weight, self.entropy_weight)

    def clipped(self, logprobs: np.ndarray) -> tuple[int, int]:
        """(groups whose gradient is clipped away at these log-probabilities, groups in all)."""
        n = len(logprobs)
        moved = self.share[:n] * (logprobs - self.old[:n])
        ratio = np.exp(np.bincount(self.group[:n], moved, len(self.gain)))
        is_clipped = (ratio < self.low) & (self.gain < 0) | (ratio > self.high) & (self.gain > 0)
        return int(is_clipped.sum()), len(np.unique(self.group[:n][self.share[:n] > 0]))


def surrogate(
    row: np.ndarray,
    is_said: np.ndarray,
    old: Sequence[Sequence[float]],
    ref: Sequence[Sequence[float]] | None,
    gains: np.ndarray,
    weights: np.ndarray,
    level: str,
    clip: tuple[float, float],
    kl_coef: float,
    entropy_coef: float,
) -> Surrogate:
    """Coefficients for a batch whose targets are of `row` (N,), those of rationales where is_said.

    old, ref: log-probabilities of each row's rationale, a token each. gains, weights: (B,) of the
    rows, in the loss; weights without the advantage. level: token; sequence, the product over its
    tokens; sequence_mean, their geometric mean.
    """
    N, B = len(row), len(gains)

    def by_token(values: np.ndarray) -> np.ndarray:
        """Values of the rows (B,), each for all tokens of its rationale."""
        return np.where(is_said, values[row], 0).astype(np.float32)

    def joined(rows: Sequence[Sequence[float]]) -> np.ndarray:
        found = np.zeros(N, np.float32)
        found[is_said] = np.concatenate(rows) if rows else []
        return found

    lengths = np.bincount(row[is_said], minlength=B)
    share = 1 / np.maximum(lengths, 1) if level == "sequence_mean" else np.ones(B)
    of_token = level == "token"
    return Surrogate(
        old=joined(old),
        ref=joined(old if ref is None else ref),
        share=by_token(share),
        group=np.arange(N, dtype=np.int32) if of_token else row.astype(np.int32),
        gain=by_token(gains) if of_token else gains.astype(np.float32),
        kl_weight=by_token(kl_coef * weights),
        entropy_weight=by_token(entropy_coef * weights),
        low=1 - clip[0],
        high=1 + clip[1],
        has_entropy=entropy_coef > 0,
    )
