"""LaTRO on a task whose right rationales are known: what each term of the loss teaches.

The query x is one token of eight, the rationale z one of eight others, and the answer f(z) for a
bijection f. Right for x is the answer of one z*(x). A model that has read random (x, z, f(z)) knows
f and writes every z alike; LaTRO has to find z*. All expectations are exact: z is enumerated.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import few
from tiny import REPOSITORY, random_gpt2

from coconut.batches.batch import collate
from coconut.batches.credit import credit
from coconut.batches.curriculum import IGNORED, Row
from coconut.batches.decoding import Decoding
from coconut.batches.rollouts import Rollout, collate_rollouts
from coconut.config.latro_keys import LatroConfig
from coconut.config.reading import check_config
from coconut.run.latro.loop import LatroRunner, read_curve
from coconut.tasks.questions import chains

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


@pytest.mark.parametrize("answer_weight", few([0.0, 1.0], 1))
def test_rationales_are_found_without_the_answer_term_and_ignored_with_it(
    twin, tmp_path, answer_weight
):
    """Spec 8.3: with the answer's own likelihood in the loss, x -> y is learnt by heart."""
    policy = warm_policy(twin, tmp_path / "model")
    before, p_before = expectation(policy)
    assert -16 < before < -6 and 0.1 < p_before < 0.15
    train(policy, answer_weight, 80)
    after, p_after = expectation(policy)
    if answer_weight == 0:
        assert p_after > 3 * p_before and after > before / 2
    else:
        assert after > -0.5


# ---- a smoke run


def carry_items() -> list[dict[str, str]]:
    """All sums of two digits; half of them, drawn, have the carry as a written rationale."""
    written = set(np.random.default_rng(0).permutation(100)[:50].tolist())
    return [
        {"question": f"{a}+{b}", "groundtruth": str(a + b)}
        | ({"rationales": str((a + b) // 10)} if 10 * a + b in written else {})
        for a in range(10)
        for b in range(10)
    ]


@pytest.mark.slow
def test_the_reward_rises_on_sums_with_a_carry(twin, tmp_path, monkeypatch):
    """Spec 8.4: warm-started on half of the data, the last updates earn more than the first."""
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    shape = json.loads((REPOSITORY / "args/models/tiny_latro.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(shape | {"n_embd": 32, "n_positions": 16}))
    monkeypatch.setattr(chains, "read", lambda path: carry_items())
    config = check_config(
        {
            "method": "latro",
            "name": "carry",
            "save_path": str(tmp_path),
            "model_config_path": str(tmp_path / "model.json"),
            "tokenizer": "bytes",
            "stop_token": "eos",
            "stop_seqs": ["="],
            "dataset_name": "chains",
            "train_path": str(tmp_path / "train.jsonl"),
            "test_path": str(tmp_path / "test.jsonl"),
            "validation_items": 20,
            "evaluation_items": 20,
            "response_length": 5,
            "warm_start_updates": 60,
            "warm_start_batch": 32,
            "warm_start_lr": 3e-3,
            "rloo_k": 4,
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 1,
            "rollout_batch_size": 32,
            "total_updates": 50,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "max_grad_norm": 1.0,
            "num_evaluations": 0,
            "pad_multiple": 16,
            "report": False,
        }
    )
    assert isinstance(config, LatroConfig)
    LatroRunner(config, twin.run.make_backend, twin.__name__).train()
    updates = read_curve(config.run_dir, "train")
    reward, finished = (
        [r[name] for r in updates] for name in ("objective/reward", "val/perc_finished_thoughts")
    )
    assert np.mean(reward[-10:]) > np.mean(reward[:10])
    assert np.isfinite([r["objective/kl"] for r in updates]).all()
    assert np.mean(finished[-10:]) >= np.mean(finished[:10]) - 0.02
