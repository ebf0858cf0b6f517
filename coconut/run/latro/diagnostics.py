"""What the rollouts of an update were like, and whether rationales still matter."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coconut.config.latro_keys import LatroConfig
from coconut.run.latro.policy_update import Round, Stepped

N_SHOWN = 2
"""Best and worst rationales of an update that the report shows, of each so many."""
MATTERS = 0.05
"""Nats that the own rationale must be better than another question's: a twentieth in odds."""


def measures(config: LatroConfig, drawn: Round, stepped: Stepped) -> dict[str, Any]:
    """The figures of an update: those with published names, and others.

    What does not exist is left out: a correlation of what is constant, a length of rationales that
    ended if none did, who was right if no reward asks, clipping in the only update.
    """
    scored, earned, K = drawn.scored, drawn.earned, config.rloo_k
    rewards, log_ratio = earned.rewards, scored.said - scored.ref
    groups = earned.adjusted.reshape(-1, K).std(axis=1)
    is_finished, n_said = drawn.is_finished, max(scored.n_said, 1)
    fields = {
        "objective/kl_penalty": earned.kl_penalty.mean(),
        "objective/rlhf_reward": earned.adjusted.mean(),
        "objective/advantage_avg": earned.advantages.mean(),
        "loss/policy_avg": -(earned.advantages * scored.said).mean(),
        "loss/sft_avg": -scored.answers.mean(),
        "val/num_stop_tokens": int(is_finished.sum()),
        "val/perc_finished_thoughts": is_finished.mean(),
        "objective/reward": rewards.mean(),
        "objective/reward_per_token": scored.answers.sum() / max(scored.n_answer, 1),
        "objective/kl": log_ratio.mean(),
        "objective/kl_per_token": log_ratio.sum() / n_said,
        "objective/group_std": groups.mean(),
        "objective/zero_variance_groups": np.mean(groups < 1e-8),
        "objective/entropy": scored.entropy / n_said,
        "objective/on_policy_gap": stepped.on_policy_gap,
        "grad_norm": stepped.grad_norm,
    }
    if config.num_iterations > 1:
        fields["objective/clip_fraction"] = stepped.clip_fraction
    return fields | _of_lengths(drawn) | _of_rewards(config, drawn)


def _of_lengths(drawn: Round) -> dict[str, Any]:
    lengths, ended = np.array([r.n_said for r in drawn.rollouts]), drawn.is_finished
    found = {
        "val/avg_rationale_length": lengths.mean(),
        "length/least": int(lengths.min()),
        "length/most": int(lengths.max()),
        # Drawn, but behind what ended the rationale: the stop, and what else was cut.
        "length/tokens_cut": sum(map(len, drawn.drawn)) - int(lengths.sum()),
    }
    if ended.any():
        of_ended = lengths[ended]
        found |= {
            "length/ended_mean": of_ended.mean(),
            "length/ended_least": int(of_ended.min()),
            "length/ended_most": int(of_ended.max()),
        }
    if lengths.std() and drawn.earned.rewards.std():
        correlation = np.corrcoef(lengths, drawn.earned.rewards)[0, 1]
        found["length/reward_correlation"] = correlation
    return found


def _of_rewards(config: LatroConfig, drawn: Round) -> dict[str, Any]:
    """Spread of the raw rewards within prompts and between their means, and single rewards."""
    groups = drawn.earned.rewards.reshape(-1, config.rloo_k)
    found = {
        "reward/std_within": np.sqrt(groups.var(axis=1).mean()),
        "reward/std_between": groups.mean(axis=1).std(),
    }
    if "correct" in drawn.rewards:
        right = drawn.rewards["correct"].reshape(groups.shape) > 0
        found["reward/all_right"] = right.all(axis=1).mean()
        found["reward/all_wrong"] = (~right).all(axis=1).mean()
        found |= {f"reward/{name}": values.mean() for name, values in drawn.rewards.items()}
    return found


def best_and_worst(drawn: Round, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """The rollouts with the highest and the lowest advantage, best first."""
    order = np.argsort(-drawn.earned.advantages, kind="stable")
    n = min(N_SHOWN, len(order) // 2)
    return [
        {
            "question": decode(drawn.rollouts[i].prompt),
            "rationale": decode(drawn.drawn[i]),
            "answer": decode(drawn.rollouts[i].answer),
            "reward": float(drawn.earned.rewards[i]),
            "advantage": float(drawn.earned.advantages[i]),
        }
        for i in [*order[:n], *order[len(order) - n :]]
    ]


def lost_rationales(own: np.ndarray, shuffled: np.ndarray) -> str | None:
    """What to say if answers are no likelier behind their own rationale than behind another's.

    own, shuffled: (n,) log-likelihoods of the same answers. None if their mean difference is at
    least MATTERS and more than twice its standard error.
    """
    gap = own - shuffled
    if gap.mean() >= max(MATTERS, 2 * gap.std() / np.sqrt(len(gap))):
        return None
    return (
        f"what a rationale says makes no difference: the right answer is {gap.mean():+.3f} nats"
        " likelier behind its own than behind another question's. If the reward has risen, the"
        " model answers from the question alone: lower sft_penalty (docs/latro.md)"
    )
