"""LaTRO runs with other rewards, advantage rules, references and several updates a rollout."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from safetensors.numpy import load_file
from test_latro_runner import config, run

from coconut.errors import UserError
from coconut.reporting.curves import read_history
from coconut.reporting.panels import panels_of
from coconut.reporting.report import page
from coconut.run.latro.diagnostics import lost_rationales
from coconut.run.latro.loop import LatroRunner, read_curve
from coconut.tasks.questions import chains

LEARNT = {"warm_start_updates": 50, "warm_start_batch": 32, "response_length": 12}
"""A start after which about a tenth of the answers are right."""


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"reward": "corect"}, "corect is none, did you mean correct"),
        ({"reward_weights": {"correct": 1}}, "only reward: mix"),
        ({"reward": "mix", "reward_weights": {"correct": "x"}}, "reward_weights.correct: expected"),
        ({"reward": "correct", "include_stop": False}, "set it to True"),
        ({"reward": "correct", "penalty_mode": "batch_mean"}, "set constant or mask"),
        ({"kl_coef": 0, "reference_every": 2}, "without a KL term"),
        ({"clip_epsilon": 0.1}, "raise num_iterations"),
        (
            {"num_iterations": 2, "ratio_level": "sequence_mean", "length_norm": "row"},
            "set none",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, keys, complaint):
    with pytest.raises(UserError, match=complaint):
        made = config(tmp_path, **keys)
        LatroRunner(made, load_twin(CHOSEN[0]).run.make_backend, CHOSEN[0])


@pytest.mark.slow
def test_a_correct_answer_is_the_reward_and_what_is_trained_reaches_to_its_end(
    twin, tmp_path, monkeypatch
):
    seen = []
    earned = LatroRunner._update

    def watched(self, u):
        step = self.backend.policy_step
        self.backend.policy_step = lambda batches, lr: (seen.append(batches), step(batches, lr))[1]
        earned(self, u)
        self.backend.policy_step = step

    monkeypatch.setattr(LatroRunner, "_update", watched)
    made = config(tmp_path, reward="correct", penalty_mode="mask", **LEARNT)
    (first, *_) = run(twin, made)
    assert first["objective/reward"] == first["reward/correct"]
    assert (
        0 <= first["reward/all_right"] <= first["reward/correct"] <= 1 - first["reward/all_wrong"]
    )
    rows = read_curve(made.run_dir, "training_samples")[0]["rows"]
    for row in rows:
        is_right = chains.answer(row["response"], {}) == row["answer"].strip("=").rstrip("\0")
        assert row["reward"] in (0.0, 1.0) and (row["reward"] == 1.0) <= is_right
    ends = {257 - 1, 256}
    batch = seen[0][0]
    said = [batch.target_ids[(batch.target_row == i) & batch.is_said] for i in range(4)]
    # Behind the stop "=" stands the answer, and behind that the end, unless there was no room.
    assert any(b"=" in bytes(s[s < 256].astype(np.uint8))[:-1] for s in said)
    assert all(s[-1] in ends or len(s) == 12 for s in said)


@pytest.mark.slow
def test_several_rewards_are_added_up_those_of_the_data_set_too(tmp_path, monkeypatch):
    given = []

    def brevity(prompt, rationale, answer, groundtruth):
        given.append((prompt, rationale, answer, groundtruth))
        return -len(rationale)

    monkeypatch.setattr(chains, "REWARDS", {"brevity": brevity}, raising=False)
    weights = {"likelihood": 1.0, "correct": 4.0, "brevity": 0.5}
    made = config(tmp_path, reward="mix", reward_weights=weights, reward_clip=6.0, **LEARNT)
    (first, *_) = run(load_twin(CHOSEN[0]), made)
    row = read_curve(made.run_dir, "training_samples")[0]["rows"][0]
    prompt, rationale, answer, truth = given[0]
    assert prompt == row["query"] and rationale == row["truncated"]
    assert answer == chains.answer(row["response"], {}) and truth in row["answer"]
    total = sum(w * first[f"reward/{name}"] for name, w in weights.items())
    assert total - 1e-6 <= first["objective/reward"] <= 6  # raised by the clipping, or equal

    monkeypatch.setattr(chains, "REWARDS", {"brevity": lambda *given: "much"})
    with pytest.raises(UserError, match=r"REWARDS\['brevity'\]\(prompt, .*must give a number, got"):
        run(load_twin(CHOSEN[0]), config(tmp_path / "text", reward="brevity"))
    monkeypatch.setattr(chains, "REWARDS", {"brevity": 1})
    with pytest.raises(UserError, match=r"REWARDS\['brevity'\] must be a function"):
        run(load_twin(CHOSEN[0]), config(tmp_path / "number", reward="brevity"))


OBJECTIVES = [
    {"advantage_rule": "grpo", "kl_in": "loss", "num_iterations": 3, "length_norm": "row"},
    {"advantage_rule": "remax", "rloo_k": 1, "num_iterations": 2, "ratio_level": "sequence"},
    {"advantage_rule": "dr_grpo", "length_norm": "constant", "entropy_coef": 0.01},
    {"num_iterations": 2, "ratio_level": "sequence_mean", "penalty_mode": "mask"},
]


@pytest.mark.parametrize("keys", few(OBJECTIVES, 1))
def test_runs_of_other_objectives_train(twin, tmp_path, keys):
    fast = {"learning_rate": 1e-2, "lr_schedule": "constant", "clip_epsilon_high": 0.05}
    if keys.get("num_iterations", 1) == 1:
        del fast["clip_epsilon_high"]
    updates = run(twin, config(tmp_path, **fast, **keys))
    assert all(np.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in updates)
    assert updates[0]["objective/on_policy_gap"] < 1e-3
    assert updates[-1]["objective/kl"] != 0
    if "num_iterations" in keys:
        assert max(r["objective/clip_fraction"] for r in updates) > 0
    else:
        assert "objective/clip_fraction" not in updates[0]


@pytest.mark.slow
def test_a_run_is_the_same_however_its_rollouts_are_dealt_into_batches(twin, tmp_path):
    keys = {"num_iterations": 2, "kl_in": "loss", "entropy_coef": 0.1, "total_updates": 1}
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    a, b = (run(twin, config(tmp_path / str(len(k)), **keys, **k))[0] for k in ({}, whole))
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("every", few([2, 1], 1))
@pytest.mark.slow
def test_a_renewed_reference_is_that_of_an_unbroken_run(twin, tmp_path, monkeypatch, every):
    keys = {"reference_every": every, "save_steps": 1, "total_updates": 4, "keep_checkpoints": 2}
    whole = run(twin, config(tmp_path / "whole", **keys))
    assert [r["objective/kl"] == 0 for r in whole] == [u % every == 0 for u in range(4)]
    kept = sorted(p.name for p in (tmp_path / "whole/tiny-latro").glob("reference_*"))
    # Of update 4, and of the checkpoints that were kept when it was written.
    assert kept == [f"reference_000{u}" for u in (2, 3, 4) if u % every == 0]
    update = LatroRunner._update

    def stop(self, u):
        if u == 3:
            raise KeyboardInterrupt
        update(self, u)

    monkeypatch.setattr(LatroRunner, "_update", stop)
    part = config(tmp_path / "part", **keys)
    with pytest.raises(KeyboardInterrupt):
        run(twin, part)
    monkeypatch.setattr(LatroRunner, "_update", update)
    newest = f"reference_000{3 // every * every}"
    (part.run_dir / newest).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{newest}: gone, and with it the reference"):
        run(twin, part)
    (tmp_path / "gone").rename(part.run_dir / newest)
    resumed = run(twin, part)
    for name in ("objective/reward", "objective/kl", "grad_norm"):
        np.testing.assert_allclose(
            [r[name] for r in resumed], [r[name] for r in whole], rtol=1e-3, atol=1e-4
        )
    ours, theirs = (
        load_file(tmp_path / p / "tiny-latro/update_0004/model.safetensors")
        for p in ("part", "whole")
    )
    assert max(float(abs(ours[n] - w).max()) for n, w in theirs.items()) < 1e-4


# ---- diagnostics


@pytest.mark.slow
def test_lengths_spreads_and_the_best_and_worst_are_logged_and_drawn(tmp_path):
    made = config(tmp_path, **LEARNT, temperature=2.0)
    updates = run(load_twin(CHOSEN[0]), made)
    samples = read_curve(made.run_dir, "training_samples")
    first, rows = updates[0], samples[0]["rows"]
    assert first["length/least"] <= first["length/ended_least"] <= first["length/ended_mean"]
    assert first["length/ended_mean"] <= first["length/ended_most"] <= first["length/most"]
    assert min(len(r["truncated"]) for r in rows) >= first["length/least"]
    assert -1 <= first["length/reward_correlation"] <= 1
    assert 0 < first["reward/std_within"] and 0 < first["reward/std_between"]
    assert "reward/all_right" not in first
    extremes = read_curve(made.run_dir, "rationales")[0]["rows"]
    assert [r["advantage"] for r in extremes] == sorted(
        (r["advantage"] for r in extremes), reverse=True
    )
    assert extremes[0]["advantage"] >= max(r["advantage"] for r in rows)
    assert extremes[-1]["advantage"] <= min(r["advantage"] for r in rows)
    history = read_history(made.run_dir)
    assert history.rationales == read_curve(made.run_dir, "rationales")[-1]["rows"]
    assert "Best and worst rationales" in page([history])
    assert {"Spread of the reward", "Length against reward"} <= {
        p.title for p in panels_of([history])
    }


def test_rationales_that_no_longer_matter_are_said(tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).normal(size=100)
    assert lost_rationales(noise, noise - 1) is None
    assert "+0.010 nats" in lost_rationales(noise, noise - 0.01)
    assert lost_rationales(noise, noise[::-1] - 0.2)  # within what chance does
    run(load_twin(CHOSEN[0]), config(tmp_path, learning_rate=0.0))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    log = (tmp_path / "tiny-latro/log.jsonl").read_text().splitlines()
    assert len(said) == sum(json.loads(line)["event"] == "warning" for line in log) == 2
    assert "makes no difference" in said[0] and "lower sft_penalty" in said[0]
