"""One update of LaTRO: rationales drawn and credited, then one or several optimizer updates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coconut.batches.batch import chunks
from coconut.batches.credit import Credit, credit, length_factors, mixed
from coconut.batches.rollouts import Rollout, RolloutBatch
from coconut.batches.surrogate import surrogate
from coconut.run.latro.draw_and_score import Rollouts, Scored


@dataclass(frozen=True)
class Round:
    """The rollouts of an update: groups of K adjacent, each with the tokens that were drawn.

    rewards: (B,) by name, before they are mixed. seconds: that drawing took.
    """

    rollouts: list[Rollout]
    drawn: list[list[int]]
    scored: Scored
    rewards: dict[str, np.ndarray]
    earned: Credit
    seconds: float

    @property
    def is_finished(self) -> np.ndarray:
        """(B,) bool: which ended within response_length."""
        return np.array([r.is_finished for r in self.rollouts])


def draw_round(shared: Rollouts, items: Sequence[dict[str, Any]], u: int) -> Round:
    """Draw, score and credit the rationales of update u."""
    config, start = shared.config, time.perf_counter()
    greedy = None
    if config.advantage_rule == "remax":
        # Alone in its group it is its own mean: only what it earned is asked for.
        greedy = _credited(shared, items, *shared.greedy(items), 0.0, 1, "dr_grpo").earned.adjusted
    drawn = shared.sample(items, u)
    seconds = time.perf_counter() - start
    rows = [item for item in items for _ in range(config.rloo_k)]
    return _credited(shared, rows, *drawn, seconds, config.rloo_k, config.advantage_rule, greedy)


def _credited(
    shared: Rollouts,
    items: Sequence[dict[str, Any]],
    rollouts: list[Rollout],
    drawn: list[list[int]],
    seconds: float,
    K: int,
    rule: str,
    greedy: np.ndarray | None = None,
) -> Round:
    config, scored = shared.config, shared.score(rollouts)
    rewards = {"likelihood": scored.answers}
    if config.writes_answers:
        found = [shared.data.earned(*x) for x in zip(rollouts, drawn, items, strict=True)]
        rewards |= {name: np.array([one[name] for one in found]) for name in found[0]}
    earned = credit(
        mixed(rewards, config.rewards, config.reward_clip),
        scored.said,
        scored.ref,
        np.array([r.is_finished for r in rollouts]),
        K,
        config.kl_coef,
        config.penalty_mode if config.non_stop_penalty else None,
        config.penalty_reward_value,
        rule,
        config.kl_in == "reward",
        greedy,
    )
    return Round(rollouts, drawn, scored, rewards, earned, seconds)


@dataclass(frozen=True)
class Stepped:
    """What the optimizer updates of a round were like.

    grad_norm: their mean, before clipping. on_policy_gap: largest difference, nats, between
    log p(rationale) when it was scored and in the first one. clip_fraction: of the ratios of all.
    """

    grad_norm: float
    on_policy_gap: float
    clip_fraction: float


def step(shared: Rollouts, drawn: Round, u: int, lr: float) -> Stepped:
    """The optimizer updates on a round's rationales."""
    config, world = shared.config, shared.world
    counts = np.ones(len(drawn.rollouts))
    if config.non_stop_penalty and config.penalty_mode == "mask":
        counts = drawn.is_finished.astype(float)
    norms, gaps, n_clipped, n_ratios = [], [], 0, 0
    for i in range(config.num_iterations):
        order = np.random.default_rng([config.seed, u, 1 + i]).permutation(len(counts))
        parts = world.share(list(chunks(order, config.batch_size_training)))
        batches = [_micro_batch(shared, drawn, part, counts) for part in parts]
        stats = shared.backend.policy_step(batches, lr)
        own = [
            [b.sums(x)[0].tolist(), *(b.surrogate.clipped(x) if b.surrogate else (0, 0))]
            for b, x in zip(batches, stats.logprobs, strict=True)
        ]
        updated, clipped, ratios = zip(*world.collect(own), strict=True)
        norms.append(stats.grad_norm)
        gaps.append(abs(np.concatenate(updated) - drawn.scored.said[order]).max())
        n_clipped, n_ratios = n_clipped + sum(clipped), n_ratios + sum(ratios)
    return Stepped(float(np.mean(norms)), float(gaps[0]), n_clipped / max(n_ratios, 1))


def _micro_batch(
    shared: Rollouts, drawn: Round, part: np.ndarray, counts: np.ndarray
) -> RolloutBatch:
    """The rollouts `part` as a batch of the loss. counts (B,): 0 for those that teach nothing."""
    config, scored, B = shared.config, drawn.scored, len(counts)
    lengths = np.array([len(r.said) for r in drawn.rollouts])
    factors = counts * length_factors(lengths, config.length_norm, config.response_length)
    advantages = (drawn.earned.advantages * factors)[part]
    batch = shared.collate(
        [drawn.rollouts[i] for i in part],
        advantages=advantages,
        answer_weight=config.sft_penalty * counts[part],
        n_rows=B,
    )
    if not config.has_surrogate:
        return batch
    high = config.clip_epsilon if config.clip_epsilon_high is None else config.clip_epsilon_high
    terms = surrogate(
        batch.target_row,
        batch.is_said,
        [scored.tokens[i] for i in part],
        [scored.ref_tokens[i] for i in part],
        advantages / B,
        factors[part] / B,
        config.ratio_level,
        (config.clip_epsilon, high),
        config.kl_coef if config.kl_in == "loss" else 0.0,
        config.entropy_coef,
    )
    # What was said is in the surrogate; the answers stay where they are.
    weight = np.where(batch.is_said, 0, batch.target_weight)
    return replace(batch, target_weight=weight, surrogate=terms)
