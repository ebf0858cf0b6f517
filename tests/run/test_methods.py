"""Every method trains and evaluates end to end on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
from conftest import few
from tiny import read_log, run_config, start

from coconut.config.methods import DATASET_METHODS, METHODS, WITH_LATENTS

# (stage, latents) of the two epochs, and keys of the method's own.
SCHEDULES = {
    "coconut": [(0, 0), (1, 2)],
    "cot": [(0, 0), (0, 0)],
    "no_cot": [(0, 0), (0, 0)],
    "no_thoughts": [(0, 0), (1, 0)],
    "pause": [(2, 2), (2, 2)],
    "pause_as_thought": [(0, 0), (1, 2)],
    "coconut_no_curriculum": [(2, 2), (2, 2)],
    "icot": [(0, 0), (0, 0)],
    "recall": [(0, 0), (0, 0)],
}


def test_every_method_is_tried_here():
    assert set(SCHEDULES) == set(METHODS) - set(DATASET_METHODS)


@pytest.mark.parametrize("method", few(SCHEDULES, 2))
def test_method_trains_two_epochs_evaluates_saves_and_is_evaluated_again(twin, tmp_path, method):
    config = run_config(tmp_path, method=method, c_thought=2)
    start(twin, config).train()
    schedule = SCHEDULES[method]
    steps, evaluations = read_log(config, "train"), read_log(config, "eval")
    assert [step["stage"] for step in steps] == [stage for stage, _ in schedule]
    assert [e["stage"] for e in evaluations] == [stage for stage, _ in schedule]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert all(math.isfinite(e["loss"]) for e in evaluations)

    stage, n_latents = schedule[-1]
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert (summary["method"], summary["stage"], summary["n"]) == (method, stage, 4)
    assert summary["n_latents"] == [n_latents, n_latents]

    checkpoint = config.run_dir / "epoch_02"
    made_with = json.loads((checkpoint / "coconut.json").read_text())
    assert (made_with["latent_ids"] is not None) == (method in WITH_LATENTS)
    assert (made_with["latent_growth"], made_with["labelled_thoughts"]) == ("stage", False)
    again = run_config(
        tmp_path,
        name="again",
        method=method,
        c_thought=2,
        only_eval=True,
        load_model_path=str(checkpoint),
        model_config_path=None,
        tokenizer=None,
    )
    start(twin, again).evaluate_once()
    first, second = ((c.run_dir / "predictions.jsonl").read_text() for c in (config, again))
    assert first == second
    assert json.loads((again.run_dir / "summary.json").read_text())["stage"] == stage


def test_only_methods_with_feedback_think(twin, tmp_path):
    losses = {}
    for method in ("coconut_no_curriculum", "pause"):
        config = run_config(tmp_path, name=method, method=method, num_epochs=1, eval_every=9)
        start(twin, config).train()
        losses[method] = read_log(config, "train")[0]["loss"]
    # Same weights, same rows: only what stands at the latents differs.
    assert losses["pause"] != losses["coconut_no_curriculum"]
    assert losses["pause"] == pytest.approx(losses["coconut_no_curriculum"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    few(
        [
            {"uniform_prob": 0.5},
            {"stage_mixing": "item"},
            {"stage_mixing": "batch"},
            {"latent_growth": "one", "c_thought": 2},
            {"pad_latent_to_max": False, "max_latent_stage": 9, "resume": 1},
            {"bf16": True},
            {"gradient_checkpointing": True},
            {"save_only_improve": True, "keep_checkpoints": 1},
        ],
        2,
    ),
    ids=lambda keys: next(iter(keys)),
)
def test_each_variant_of_a_run_ends_in_a_summary(twin, tmp_path, keys):
    config = run_config(tmp_path, **keys)
    start(twin, config).train()
    assert all(math.isfinite(step["loss"]) for step in read_log(config, "train"))
    assert json.loads((config.run_dir / "summary.json").read_text())["epoch"] == 2
    assert (config.run_dir / "epoch_02").is_dir()
