"""Whole LaTRO runs on both twins: keys, counting, metrics, resuming, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CHOSEN, few, load_twin
from safetensors.numpy import load_file

from coconut.config.keys import PUBLISHED_NAMES
from coconut.config.latro_keys import LatroConfig
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError
from coconut.plan.latro_plan import print_latro_plan
from coconut.reporting.curves import read_history
from coconut.reporting.panels import panels_of
from coconut.run.answering import evaluate_data_set
from coconut.run.latro.loop import LatroRunner, read_curve
from coconut.run.latro.resume import plan_lines, resumed_from

REPOSITORY = Path(__file__).parents[2]
PUBLISHED_METRICS = (
    *("eps", "objective/kl_penalty", "objective/rlhf_reward", "objective/advantage_avg"),
    *("loss/policy_avg", "loss/sft_avg", "val/num_stop_tokens", "val/perc_finished_thoughts"),
    *("val/avg_rationale_length", "lr", "episode"),
)


def config(folder: Path, **keys) -> LatroConfig:
    test = folder / "test.jsonl"
    if not test.exists():
        folder.mkdir(exist_ok=True)
        lines = (REPOSITORY / "data/chains_test.jsonl").read_text().splitlines()[:12]
        test.write_text("".join(line + "\n" for line in lines))
    values = yaml.safe_load((REPOSITORY / "args/tiny_latro.yaml").read_text())
    values |= {
        "save_path": str(folder),
        "model_config_path": str(REPOSITORY / "args/models/tiny_latro.json"),
        "train_path": str(REPOSITORY / "data/chains_train.jsonl"),
        "test_path": str(test),
        "warm_start_updates": 3,
        "warm_start_batch": 8,
        "rloo_k": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "rollout_batch_size": 3,
        "total_updates": 3,
        "response_length": 5,
        "evaluation_items": 8,
        "num_evaluations": 1,
        "report": False,
    }
    made = check_config(values | keys)
    assert isinstance(made, LatroConfig)
    return made


def run(twin, made: LatroConfig) -> list[dict]:
    LatroRunner(made, twin.run.make_backend, twin.__name__).train()
    return read_curve(made.run_dir, "train")


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"rloo_k": 1}, "at least 2"),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
            "multiple of rloo_k",
        ),
        ({"c_thought": 2}, "does not read it"),
        ({"stop_seqs": [""]}, "every rationale at once"),
        ({"temperature": 0}, "must be above 0"),
        ({"rloo_kk": 4}, "did you mean rloo_k"),
        ({"penalty_mode": "harsh"}, "expected one of"),
        ({"stop_seqs": "abc"}, "expected a list of texts"),
        ({"feedback": "last"}, "set latro_latents too"),
        ({"lora": {"dropout": 0.5}}, "scored as they were drawn"),
        ({"num_train_epochs": 0, "total_updates": None}, "num_train_epochs: 0 trains nothing"),
    ],
)
def test_a_wrong_key_is_one_clear_line(tmp_path, keys, complaint):
    with pytest.raises(UserError, match=complaint):
        config(tmp_path, **keys)


def test_a_preset_is_overridden_key_by_key(tmp_path):
    released = config(tmp_path, preset="released", separator="\n")
    assert (released.sft_penalty, released.reward_offset, released.include_stop) == (0, -1, False)
    assert (released.stop_matching, released.penalty_mode) == ("ids", "batch_mean")
    assert released.separator == "\n"
    paper = config(tmp_path)
    assert (paper.sft_penalty, paper.reward_offset, paper.separator) == (1, 0, "\n")


def test_the_resolved_configuration_loads_to_the_same_run(tmp_path):
    made = config(tmp_path, preset="released", stop_seqs=["\nThe answer is", "="])
    path = tmp_path / "resolved.yaml"
    path.write_text(made.to_yaml())
    assert load_config(path) == made


def test_epochs_count_prompts_or_as_released_rollouts(tmp_path):
    published = {"rloo_k": 16, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 12}
    made = config(tmp_path, **published, num_train_epochs=6, total_updates=None)
    assert made.n_updates(7473) == int(np.ceil(6 * 7473 / 24))
    made.epoch_counts = "rollouts"
    assert made.n_updates(7473) == 117  # 48 rollouts on each of 8 processes
    assert "0.38 passes" in plan_lines(made, 7473)[1]
    made.total_episodes = 385
    assert made.n_updates(7473) == 2


@pytest.mark.parametrize(
    "name", ["latro_gsm8k", "latro_gsm8k_qwen_lora", "latro_arc_challenge", "tiny_latro"]
)
def test_runs_that_ship_are_right(monkeypatch, name):
    monkeypatch.chdir(REPOSITORY)
    made = load_config(f"args/{name}.yaml")
    assert isinstance(made, LatroConfig) and made.local_batch % made.rloo_k == 0


def test_a_run_logs_the_published_metrics_and_starts_at_its_reference(twin, tmp_path):
    made = config(tmp_path)
    updates = run(twin, made)
    assert len(updates) == 3
    for record in updates:
        assert set(PUBLISHED_METRICS) <= record.keys()
        assert abs(record["objective/advantage_avg"]) < 1e-9
        assert record["objective/on_policy_gap"] < 1e-3
    assert updates[0]["objective/kl"] == 0 != updates[2]["objective/kl"]
    assert [r["episode"] for r in updates] == [8, 16, 24]
    evaluations = read_curve(made.run_dir, "eval")
    assert [e["step"] for e in evaluations] == [0, 1, 3]
    assert json.loads((made.run_dir / "update_0003/coconut.json").read_text())["method"] == "latro"


@pytest.mark.slow
@pytest.mark.compiled
def test_a_resumed_run_is_an_unbroken_one(twin, tmp_path, monkeypatch):
    whole = run(twin, config(tmp_path / "whole", save_steps=1))
    part = config(tmp_path / "part", save_steps=1)
    update = LatroRunner._update

    def stop(self, u):
        if u == 2:
            raise KeyboardInterrupt
        update(self, u)

    monkeypatch.setattr(LatroRunner, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(twin, part)
    monkeypatch.setattr(LatroRunner, "_update", update)
    resumed = run(twin, part)
    for name in ("objective/reward", "objective/kl", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in resumed], [r[name] for r in whole], rtol=1e-3)
    ours, theirs = (
        load_file(p / "tiny-latro/update_0003/model.safetensors")
        for p in (tmp_path / "part", tmp_path / "whole")
    )
    assert max(float(abs(ours[n] - w).max()) for n, w in theirs.items()) < 1e-4


@pytest.mark.slow
def test_a_run_goes_on_from_another_run_with_its_reference(twin, tmp_path):
    whole = run(twin, config(tmp_path, save_steps=1, run_name="whole"))
    directory = tmp_path / "whole/update_0001"
    elsewhere = {"run_name": "elsewhere", "checkpoint_path": str(directory)}
    resumed = run(twin, config(tmp_path, **elsewhere))
    assert [r["step"] for r in resumed] == [2, 3]
    for name in ("objective/reward", "objective/kl", "grad_norm"):
        rest = [r[name] for r in whole[1:]]
        np.testing.assert_allclose([r[name] for r in resumed], rest, rtol=1e-3)
    (tmp_path / "whole/warm_start").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="reference of the KL term"):
        run(twin, config(tmp_path, **elsewhere | {"run_name": "third"}))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("of", ["data/checkpoints/prosqa", "data"])
def test_only_a_run_of_latro_can_be_gone_on_from(tmp_path, of):
    made = config(tmp_path, checkpoint_path=str(REPOSITORY / of))
    for start in (resumed_from, lambda made: print_latro_plan(made, "mlx_coconut")):
        with pytest.raises(UserError, match=r"cannot go on from it|not a finished"):
            start(made)


@pytest.mark.parametrize(
    "keys",
    [
        {"rollout_batch_size": 8},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    ],
)
@pytest.mark.slow
def test_neither_rows_sampled_at_a_time_nor_micro_batches_change_an_update(twin, tmp_path, keys):
    ours, theirs = (
        run(twin, config(tmp_path / str(len(k)), total_updates=2, **k)) for k in ({}, keys)
    )
    for a, b in zip(ours, theirs, strict=True):
        # Sums of float32 in another order; behind the first update Adam's division makes 1e-7 of
        # a small gradient a part in 1e-4 of a step.
        assert a["objective/reward"] == pytest.approx(b["objective/reward"], abs=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.slow
def test_rationales_that_begin_with_thoughts_train(twin, tmp_path, preset):
    # As released, rows that all fail to end would all get one reward, which teaches nothing.
    keys = {"preset": preset, "non_stop_penalty": False, "feedback": "layer:1|rms:learned"}
    made = config(tmp_path, latro_latents=2, **keys)
    updates = run(twin, made)
    written = json.loads((made.run_dir / "update_0003/coconut.json").read_text())
    assert written["feedback"] == made.feedback
    assert updates[0]["objective/kl"] == 0
    assert all(np.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in updates)
    assert all(r["objective/on_policy_gap"] < 1e-3 for r in updates)


@pytest.mark.slow
def test_thoughts_by_a_trained_rule_survive_a_stop(twin, tmp_path):
    keys = {"latro_latents": 2, "feedback": "last|mlp:4", "total_updates": 1}
    run(twin, config(tmp_path, **keys))
    again = LatroRunner(config(tmp_path, **keys), twin.run.make_backend, twin.__name__)
    again.console.close()
    saved = load_file(again.run_dir / "update_0001/feedback.safetensors")
    again.backend.save(tmp_path, with_optimizer=False)
    held = load_file(tmp_path / "feedback.safetensors")
    assert saved and all(np.array_equal(held[n], w) for n, w in saved.items())
    begun = load_file(again.run_dir / "warm_start/feedback.safetensors")
    assert any((held[n] != w).any() for n, w in begun.items())


@pytest.mark.parametrize(
    "rule, why", [("last|noise:0.1", "cannot score noise"), ("last|linear:init=ridge", "fits no")]
)
def test_a_rule_that_latro_cannot_train_leaves_no_run_behind(twin, tmp_path, rule, why):
    made = config(tmp_path, latro_latents=2, feedback=rule)
    with pytest.raises(UserError, match=why):
        run(twin, made)
    assert not made.run_dir.exists()


@pytest.mark.slow
def test_a_run_draws_its_curves_at_each_evaluation(twin, tmp_path, monkeypatch):
    drawn = []

    class Standin:
        def __init__(self, run_dir, say):
            drawn.append(run_dir)

        def draw(self):
            drawn.append("draw")

        def finish(self):
            drawn.append("finish")

    monkeypatch.setattr("coconut.run.start.Reporter", Standin)
    made = config(tmp_path, report=True, total_updates=2, warm_start_updates=1)
    run(twin, made)
    assert drawn == [made.run_dir, "draw", "draw", "finish"]
    history = read_history(made.run_dir)
    titles = [panel.title for panel in panels_of([history])]
    assert titles[:4] == ["Right answers", "Reward", "KL to the reference", "Finished rationales"]
    assert history.summary["update"] == history.summary["n_updates"] == 2
    assert history.summary["samples_per_second"] > 0 < history.summary["peak_memory_bytes"]
    assert (history.summary["device"], history.summary["dtype"]) == ("cpu", "float32")


@pytest.mark.slow
def test_without_a_kl_term_no_reference_is_kept(twin, tmp_path):
    made = config(tmp_path, kl_coef=0, total_updates=1)
    runner = LatroRunner(made, twin.run.make_backend, twin.__name__)
    runner.train()
    assert runner.backend.policy.reference is None


@pytest.mark.slow
def test_an_adapter_is_trained_beside_a_frozen_base(twin, tmp_path):
    base = config(tmp_path / "base", total_updates=0).run_dir / "warm_start"
    run(twin, config(tmp_path / "base", total_updates=0))
    begin = {"model_config_path": None, "tokenizer": None, "warm_start_updates": 0}
    made = config(
        tmp_path, **begin, load_model_path=str(base), lora={"rank": 2}, save_steps=2, bf16=True
    )
    updates = run(twin, made)
    assert updates[0]["objective/kl"] == 0 != updates[2]["objective/kl"]
    assert (made.run_dir / "update_0002/adapters.safetensors").exists()
    assert not list(made.run_dir.glob("*/model.safetensors"))


def test_a_warm_start_without_written_rationales_is_refused(twin, tmp_path):
    bare = tmp_path / "bare.jsonl"
    lines = (REPOSITORY / "data/chains_train.jsonl").read_text().splitlines()
    kept = [line for line in lines if "rationales" not in line][:20]
    bare.write_text("".join(line + "\n" for line in kept))
    with pytest.raises(UserError, match="no item has a rationale"):
        run(twin, config(tmp_path, train_path=str(bare), validation_items=8))


@pytest.mark.slow
def test_test_split_is_asked_once_by_the_best_checkpoint(twin, tmp_path):
    made = config(tmp_path, test_at_end=True, sanity_check=True)
    run(twin, made)
    first = (made.run_dir / "test.json").stat().st_mtime_ns
    run(twin, made)
    assert (made.run_dir / "test.json").stat().st_mtime_ns == first
    assert json.loads((made.run_dir / "test.json").read_text())["n"] == 12


@pytest.mark.slow
def test_without_evaluations_the_last_weights_answer_the_test(twin, tmp_path):
    made = config(tmp_path, test_at_end=True, num_evaluations=0)
    run(twin, made)
    assert not (made.run_dir / "best").exists() and not read_curve(made.run_dir, "eval")
    assert json.loads((made.run_dir / "test.json").read_text())["checkpoint"] == "last"


@pytest.mark.parametrize("damage", few(["gone", "broken", "long"], 1))
def test_a_test_split_that_cannot_be_asked_is_refused_before_training(twin, tmp_path, damage):
    made = config(tmp_path, test_at_end=True)
    test = Path(str(made.test_path))
    if damage == "gone":
        test.unlink()
    elif damage == "broken":
        test.write_text("{")
    else:
        test.write_text(json.dumps({"question": "1" * 70, "groundtruth": "2"}) + "\n")
    for do in (run, lambda _, c: print_latro_plan(c, twin.__name__)):
        with pytest.raises(UserError, match=r"test\.jsonl"):
            do(twin, made)
    assert not made.run_dir.exists()


def test_a_row_too_long_is_named_with_what_takes_the_room(tmp_path):
    for keys, complaint in (
        ({"response_length": 60}, r"chains_train\.jsonl: item \d+: .* lower response_length from"),
        ({"latro_latents": 60}, r"and 62 for its thoughts take .* lower latro_latents"),
    ):
        with pytest.raises(UserError, match=complaint):
            print_latro_plan(config(tmp_path, **keys), "mlx_coconut")


def test_a_written_rationale_too_long_for_the_warm_start_is_named(tmp_path):
    lines = (REPOSITORY / "data/chains_train.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    at = next(i for i, item in enumerate(items) if "rationales" in item)
    items[at]["rationales"] += " 1" * 40
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(UserError, match=rf"train\.jsonl: item {at}: .* positions"):
        print_latro_plan(config(tmp_path, train_path=str(train)), "mlx_coconut")


def test_a_stop_that_is_no_token_is_named(tmp_path):
    with pytest.raises(UserError, match="stop_token_ids: 300: the tokenizer has tokens 0 to 256"):
        print_latro_plan(config(tmp_path, stop_token_ids=[300]), "mlx_coconut")


@pytest.mark.slow
def test_thoughts_cannot_be_added_to_a_run_that_has_begun(twin, tmp_path):
    run(twin, config(tmp_path, run_name="mine"))
    more = config(tmp_path, run_name="mine", latro_latents=2, total_updates=5)
    with pytest.raises(UserError, match="update_0003: was trained with latro_latents: 0, not 2"):
        run(twin, more)
    other = config(tmp_path, run_name="other", checkpoint_path=str(more.run_dir / "warm_start"))
    with pytest.raises(UserError, match="holds weights alone"):
        run(twin, other)


@pytest.mark.slow
def test_a_run_whose_reference_is_gone_does_not_take_another(twin, tmp_path):
    made = config(tmp_path)
    run(twin, made)
    (made.run_dir / "warm_start").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="warm_start: gone, and with it the reference"):
        run(twin, config(tmp_path, total_updates=5))


@pytest.mark.parametrize("keys", few([{"warm_start_lr": 1e30}, {"learning_rate": 1e30}], 1))
def test_diverged_weights_are_one_line_and_never_written(twin, tmp_path, keys):
    made = config(tmp_path, num_evaluations=0, total_updates=1, **keys)
    with pytest.raises(UserError, match="not finite; lower"):
        run(twin, made)
    kept = {path.name for path in made.run_dir.iterdir() if path.is_dir()}
    assert kept == (set() if "warm_start_lr" in keys else {"warm_start"})


@pytest.mark.slow
def test_the_answer_rule_of_the_run_judges_its_evaluations(tmp_path, monkeypatch):
    from coconut.tasks.questions import chains

    made = config(tmp_path, answer_rule="released", test_at_end=True)
    monkeypatch.setattr(chains, "released", lambda output, item: True, raising=False)
    run(load_twin(CHOSEN[0]), made)
    assert [e["eval/zero_shot_acc"] for e in read_curve(made.run_dir, "eval")] == [1.0] * 3
    found = json.loads((made.run_dir / "test.json").read_text())
    assert found["eval/zero_shot_acc"] == found["accuracy_released"] == 1.0
    assert found["accuracy_corrected"] < 1.0 and len(found["data_sha256"]) == 64


@pytest.mark.slow
def test_debug_runs_keep_nothing_and_others_as_many_as_asked_for(tmp_path):
    twin = load_twin(CHOSEN[0])
    made = config(tmp_path, run_name="debug", debug=True, save_steps=1)
    run(twin, made)
    assert not [path for path in made.run_dir.iterdir() if path.is_dir()]
    made = config(tmp_path, run_name="kept", keep_checkpoints=2, save_steps=1)
    run(twin, made)
    found = sorted(path.name for path in made.run_dir.glob("update_*"))
    assert found == ["update_0002", "update_0003"]


@pytest.mark.slow
def test_questions_held_out_stay_held_out_when_a_run_goes_on(tmp_path):
    twin = load_twin(CHOSEN[0])
    run(twin, config(tmp_path))
    with pytest.raises(UserError, match="other questions were held out"):
        run(twin, config(tmp_path, total_updates=5, split_seed=3, resume_changed=True))


PUBLISHED_ARGUMENTS = {
    "exp_name": "mine",
    "run_name": "mine-1",
    "sanity_check": True,
    "model_name_or_path": "someone/model",
    "checkpoint_path": "runs/mine/update_1",
    "total_episodes": 960,
    "num_evaluations": 6,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 20,
    "gradient_accumulation_steps": 6,
    "num_train_epochs": 3,
    "save_steps": 0.1,
    "learning_rate": 1e-6,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": True,
    "seed": 3,
    "rollout_batch_size": 16,
    "response_length": 500,
    "stop_token": "both",
    "stop_token_ids": [1, 2],
    "stop_seqs": ["Answer:"],
    "temperature": 1,
    "penalty_reward_value": 2,
    "non_stop_penalty": False,
    "kl_coef": 0.25,
    "rloo_k": 12,
    "sft_penalty": 0,
    "dataset_name": "arc_challenge",
    "dataset_num_proc": 4,
}
"""Of LaTRO's training script, and those it inherits that matter, with values that fit together."""


def test_every_published_argument_is_taken_under_its_name():
    made = check_config({"method": "latro"} | PUBLISHED_ARGUMENTS)
    for name, value in PUBLISHED_ARGUMENTS.items():
        assert getattr(made, PUBLISHED_NAMES.get(name, name)) == value, name
    evaluation = {
        "base_model_name_or_path": "someone/model",
        "eval_model_name_or_path": str(REPOSITORY / "data/checkpoints/prosqa"),
        "dataset_name": "gsm8k_0shot",
        "eval_batch_size": 64,
        "response_length": 500,
        "temperature": 0.7,
        "seed": 42,
        "stop_token": "eos",
        "stop_token_ids": [5],
    }
    made = check_config({"method": "latro", "only_eval": True} | evaluation)
    for name, value in evaluation.items():
        assert getattr(made, PUBLISHED_NAMES.get(name, name)) == value, name


@pytest.mark.slow
def test_a_model_with_thoughts_is_asked_with_its_thoughts(twin, tmp_path):
    run(twin, config(tmp_path, latro_latents=2, total_updates=1, warm_start_updates=1))
    trained = str(tmp_path / "tiny-latro/update_0001")
    keys = {"load_model_path": trained, "model_config_path": None, "tokenizer": None}
    made = config(tmp_path, only_eval=True, run_name="eval", latro_latents=2, **keys)
    evaluate_data_set(made, twin.run.make_backend, twin.__name__)
    line = (made.run_dir / "predictions.jsonl").read_text().splitlines()[0]
    # Four digits with spaces and a colon, two thoughts between their markers.
    assert json.loads(line)["prompt_tokens"] == 8 + 4
    with pytest.raises(UserError, match="set latro_latents: 2, as in its training"):
        plain = config(tmp_path, only_eval=True, run_name="plain", **keys)
        evaluate_data_set(plain, twin.run.make_backend, twin.__name__)


def test_an_evaluation_says_that_thoughts_are_new_to_the_model(tmp_path, capsys):
    twin = load_twin(CHOSEN[0])
    run(twin, config(tmp_path, run_name="bare", total_updates=1, warm_start_updates=1))
    keys = {"load_model_path": str(tmp_path / "bare/update_0001"), "model_config_path": None}
    made = config(tmp_path, only_eval=True, latro_latents=2, tokenizer=None, **keys)
    capsys.readouterr()
    evaluate_data_set(made, twin.run.make_backend, twin.__name__)
    assert "this model was trained without thoughts" in capsys.readouterr().out
