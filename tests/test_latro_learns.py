"""LaTRO on a task whose right rationales are known: what each term of the loss teaches.

The query x is one token of eight, the rationale z one of eight others, and the answer f(z) for a
bijection f. Right for x is the answer of one z*(x). A model that has read random (x, z, f(z)) knows
f and writes every z alike; LaTRO has to find z*. All expectations are exact: z is enumerated.
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny import random_gpt2

from coconut.backend import Decoding
from coconut.batch import collate
from coconut.curriculum import IGNORED, Row
from coconut.rollouts import Rollout, collate_rollouts, credit

N, K, PROMPTS, BETA = 8, 8, 8, 0.05
F = np.random.default_rng(1).permutation(N)
RIGHT = np.random.default_rng(2).permutation(N)
"""f, and z*(x); tokens are x, N + z and 2 N + f(z)."""


def rollout(x: int, z: int) -> Rollout:
    """Rationale z for query x, before the right answer of x."""
    return Rollout([x], [N + z], [], [], [2 * N + int(F[RIGHT[x]])], 1, True)


def warm_policy(twin, directory):
    """A policy that knows f and writes every z alike: all 64 (x, z, f(z)), 80 times."""
    model, _, _ = twin.weights.load_model(random_gpt2(directory, 3 * N + 1, 32, n_layer=2))
    trainer = twin.train.Trainer(model, weight_decay=0.0)
    rows = [
        Row(0, [x, N + z, 2 * N + int(F[z])], [IGNORED, N + z, 2 * N + int(F[z])], -1, 0)
        for x in range(N)
        for z in range(N)
    ]
    batch = collate(rows, 3 * N)
    for u in range(80):
        trainer.step([batch], 5e-3, (0, u))
    trainer.reset_optimizer()
    policy = twin.latro.Policy(trainer)
    policy.keep_reference()
    return policy


def expectation(policy) -> tuple[float, float]:
    """(expected reward, mean probability of z*) over all queries."""
    batch = collate_rollouts([rollout(x, z) for x in range(N) for z in range(N)], 3 * N)
    said, rewards = (v.reshape(N, N) for v in batch.sums(policy.score(batch).logprobs))
    p = np.exp(said)
    return float((p * rewards).sum(1).mean()), float(p[np.arange(N), RIGHT].mean())


def train(policy, answer_weight: float, n_updates: int) -> None:
    prompts = collate([Row(x, [x], None, -1, 0) for x in range(N)], 3 * N)
    source = np.repeat(np.arange(PROMPTS) % N, K)
    for u in range(n_updates):
        streams = [(u, i) for i in range(len(source))]
        drawn = policy.sample(prompts, Decoding(1, -1, 1.0, 0), source, streams)
        rows = [
            Rollout([int(x)], d.tokens, [], [], [2 * N + int(F[RIGHT[x]])], 1, True)
            for x, d in zip(source, drawn, strict=True)
        ]
        batch = collate_rollouts(rows, 3 * N)
        said, rewards = batch.sums(policy.score(batch).logprobs)
        ref, _ = batch.sums(policy.score(batch, of_reference=True).logprobs)
        earned = credit(rewards, said, ref, np.ones(len(rows), bool), K, BETA, None, 0)
        weights = {"advantages": earned.advantages, "n_rows": len(rows)}
        policy.step([collate_rollouts(rows, 3 * N, answer_weight=answer_weight, **weights)], 3e-3)


@pytest.mark.parametrize("answer_weight", [0.0, 1.0])
def test_rationales_are_found_without_the_answer_term_and_ignored_with_it(
    twin, tmp_path, answer_weight
):
    """Spec 8.3: with the answer's own likelihood in the loss, x -> y is learnt by heart."""
    policy = warm_policy(twin, tmp_path / "model")
    before, p_before = expectation(policy)
    assert -16 < before < -6 and 0.1 < p_before < 0.15
    train(policy, answer_weight, 80)
    after, p_after = expectation(policy)
    print(twin.__name__, answer_weight, before, p_before, after, p_after)
    if answer_weight == 0:
        assert p_after > 3 * p_before and after > before / 2
    else:
        assert after > -0.5
