"""What a rollout earned: its reward, and its advantage over its siblings."""

from dataclasses import dataclass

import numpy as np

# ---- rewards


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


def penalised(
    rewards: np.ndarray, is_finished: np.ndarray, K: int, mode: str, value: float
) -> np.ndarray:
    """Rewards (B,) with those of unfinished rationales worsened; groups of K are adjacent.

    constant: value nats less. group_mean: value times the group's mean, if that is less.
    batch_mean: value times the mean of all rows, as released (it can also raise a reward).
    Means include the unfinished rows.
    """
    if mode == "constant":
        worse = rewards - value
    elif mode == "group_mean":
        group = np.repeat(rewards.reshape(-1, K).mean(axis=1), K)
        worse = np.minimum(rewards, value * group)
    else:
        worse = np.full_like(rewards, value * rewards.mean())
    return np.where(is_finished, rewards, worse)


@dataclass(frozen=True)
class Credit:
    """What each rollout of a batch earned, (B,) float64 each, nats.

    rewards: log p(answer). penalised: after the penalty. kl_penalty: -beta times the log-ratio of
    policy and reference. adjusted: the sum of the two. advantages: over the siblings.
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
) -> Credit:
    """Rewards to advantages; rows of a prompt are adjacent. penalty_mode None: no penalty."""
    after = rewards
    if penalty_mode is not None:
        after = penalised(rewards, is_finished, K, penalty_mode, penalty_value)
    kl_penalty = -kl_coef * (logprobs - ref_logprobs)
    adjusted = after + kl_penalty
    advantages = leave_one_out(adjusted.reshape(-1, K)).reshape(-1)
    return Credit(rewards, after, kl_penalty, adjusted, advantages)
