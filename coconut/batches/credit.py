"""What a rollout earned: its reward, its advantage over its siblings, its weight in the loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# ---- rewards


def mixed(
    rewards: Mapping[str, np.ndarray], weights: Mapping[str, float], clip: float = 0.0
) -> np.ndarray:
    """(B,) the weighted sum of rewards (B,), kept within `clip` of 0 unless that is 0."""
    total = np.sum([weight * rewards[name] for name, weight in weights.items()], axis=0)
    return np.clip(total, -clip, clip) if clip else total


def penalised(
    rewards: np.ndarray, is_finished: np.ndarray, K: int, mode: str, value: float
) -> np.ndarray:
    """Rewards (B,) with those of unfinished rationales worsened; groups of K are adjacent.

    constant: value nats less. group_mean: value times the group's mean, if that is less.
    batch_mean: value times the mean of all rows, as released (it can also raise a reward).
    Means include the unfinished rows. mask: unchanged; the row's weight in the loss is 0 instead.
    """
    if mode == "constant":
        worse = rewards - value
    elif mode == "group_mean":
        group = np.repeat(rewards.reshape(-1, K).mean(axis=1), K)
        worse = np.minimum(rewards, value * group)
    elif mode == "batch_mean":
        worse = np.full_like(rewards, value * rewards.mean())
    else:
        return rewards
    return np.where(is_finished, rewards, worse)


# ---- advantages

SPREAD = 1e-4
"""What GRPO adds to a group's standard deviation, as trl does."""


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Advantage of each rationale over the mean of its siblings.

    rewards: (P, K) nats, one row a prompt. Returns (P, K), each row sums to 0.
    Raises ValueError if K < 2: a single sample has no baseline.
    Source: Ahmadian et al. 2024 (RLOO); LaTRO's trainer uses the same form.
    """
    K = rewards.shape[1]
    if K < 2:
        raise ValueError(f"leave-one-out needs at least 2 samples a prompt, got {K}")
    # From differences, so that a constant added to a group changes nothing.
    return (rewards - rewards.mean(axis=1, keepdims=True)) * (K / (K - 1))


def over_siblings(
    rewards: np.ndarray, rule: str = "rloo", greedy: np.ndarray | None = None
) -> np.ndarray:
    """(P, K) advantages of rewards (P, K), one row a prompt.

    rloo: leave-one-out. dr_grpo: over the group's mean. grpo: that over the group's standard
    deviation (of K - 1). remax: over what the prompt's greedy rationale earned, greedy (P,).
    Sources: Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO), Li et al. 2023 (ReMax).
    """
    if rule == "rloo":
        return leave_one_out(rewards)
    if rule == "remax":
        assert greedy is not None, "drawn for this rule"
        return rewards - greedy[:, None]
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if rule == "grpo":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + SPREAD)
    return centred


@dataclass(frozen=True)
class Credit:
    """What each rollout of a batch earned, (B,) float64 each, nats.

    rewards: log p(answer), or what else is rewarded. penalised: after the penalty. kl_penalty:
    -beta times the log-ratio of policy and reference. adjusted: their sum, if the KL is in the
    reward; else the reward alone. advantages: over the siblings.
    """

    rewards: np.ndarray
    penalised: np.ndarray
    kl_penalty: np.ndarray
    adjusted: np.ndarray
    advantages: np.ndarray


def credit(
    rewards: np.ndarray,
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    is_finished: np.ndarray,
    K: int,
    kl_coef: float,
    penalty_mode: str | None,
    penalty_value: float,
    rule: str = "rloo",
    kl_in_reward: bool = True,
    greedy: np.ndarray | None = None,
) -> Credit:
    """Rewards to advantages; rows of a prompt are adjacent. penalty_mode None: no penalty.

    rule, greedy: of `over_siblings`.
    """
    after = rewards
    if penalty_mode is not None:
        after = penalised(rewards, is_finished, K, penalty_mode, penalty_value)
    kl_penalty = -kl_coef * (logprobs - ref_logprobs)
    adjusted = after + kl_penalty if kl_in_reward else after
    advantages = over_siblings(adjusted.reshape(-1, K), rule, greedy).reshape(-1)
    return Credit(rewards, after, kl_penalty, adjusted, advantages)


# ---- weights


def length_factors(lengths: np.ndarray, norm: str, longest: int) -> np.ndarray:
    """(B,) what a row's policy terms are multiplied by: lengths (B,) in tokens, stops included.

    none: 1, a sum over tokens. row: a mean over the row's. batch: over those of all rows, which
    together weigh B. constant: 1 / longest.
    """
    if norm == "row":
        return 1 / np.maximum(lengths, 1)
    if norm == "batch":
        return np.full(len(lengths), len(lengths) / max(lengths.sum(), 1))
    return np.full(len(lengths), 1 / longest if norm == "constant" else 1.0)
