"""Updates: accumulation, clipping, schedules, the optimizer's resets, traces, overfitting."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from golden_models import TOKENS, ragged_batch
from safetensors.numpy import load_file
from tiny import (
    MODEL,
    assert_same_gradients,
    gradients,
    read_log,
    rows_of,
    run_config,
    start,
    write_items,
)

from coconut.backend import StepStats
from coconut.batches.batch import collate
from coconut.errors import UserError
from coconut.run.curriculum_loop import Runner
from coconut.run.learning_rate import learning_rate

LOSS = 2e-6  # relative; 1.2e-7 seen
GRADIENTS = 2e-5  # of a tensor's norm; 1.5e-6 seen
EIGHT = (1, 0, 3, 2, 2, 0, 1, 1)


def eight_in_parts(*sizes: int):
    """One batch of eight rows with ragged targets, and the same rows in micro-batches."""
    rows = rows_of(ragged_batch(1, EIGHT))
    parts = [rows[a:b] for a, b in pairwise(np.cumsum([0, *sizes]))]
    eos = TOKENS["eos"]
    return [collate(rows, eos)], [collate(part, eos) for part in parts]


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2)])
@pytest.mark.compiled
def test_micro_batches_equal_one_batch_of_all_rows(twin, tmp_path, sizes):
    whole, parts = eight_in_parts(*sizes)
    assert len({part.n_targets / len(part.ids) for part in parts}) > 1  # ragged
    expected, theirs = gradients(twin, MODEL, whole, tmp_path)
    stats, ours = gradients(twin, MODEL, parts, tmp_path)
    assert stats.n_targets == expected.n_targets
    assert stats.loss == pytest.approx(expected.loss, rel=LOSS)
    assert stats.grad_norm == pytest.approx(expected.grad_norm, rel=GRADIENTS)
    assert_same_gradients(ours, theirs, GRADIENTS)


@pytest.mark.slow
def test_short_last_group_weighs_its_targets_alone(twin, tmp_path):
    write_items(tmp_path / "train.json", 10)
    keys = {"num_epochs": 1, "c_thought": 2, "eval_every": 9}
    whole = run_config(tmp_path, name="whole", **keys)
    parts = run_config(
        tmp_path, name="parts", batch_size_training=4, gradient_accumulation_steps=2, **keys
    )
    for config in (whole, parts):
        start(twin, config).train()
    expected, ours = read_log(whole, "train"), read_log(parts, "train")
    assert [step["step"] for step in ours] == [1, 2]
    for name in ("loss", "grad_norm"):
        values = [step[name] for step in ours]
        assert values == pytest.approx([step[name] for step in expected], rel=GRADIENTS)


def test_clipping_scales_the_gradient_and_reports_its_norm_before(twin, tmp_path):
    batch = [ragged_batch(2)]
    free, whole = gradients(twin, MODEL, batch, tmp_path)
    most = free.grad_norm / 3
    clipped, scaled = gradients(twin, MODEL, batch, tmp_path, max_grad_norm=most)
    assert [clipped.grad_norm, free.grad_norm] == pytest.approx([norm(whole)] * 2, rel=1e-5)
    assert norm(scaled) == pytest.approx(most, rel=1e-5)
    assert_same_gradients({n: 3 * g for n, g in scaled.items()}, whole, 1e-5)
    _, loose = gradients(twin, MODEL, batch, tmp_path, max_grad_norm=10 * free.grad_norm)
    assert_same_gradients(loose, whole, 1e-5)


def norm(grads: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))


@pytest.mark.compiled
def test_learning_rate_of_each_step_reaches_the_optimizer(twin):
    model, module, _ = twin.weights.load_model(MODEL)
    trainer = twin.train.Trainer(model, weight_decay=0.0)
    moved = []
    for lr in (1e-3, 0.0, 1e-4):
        before = twin.weights.to_numpy(twin.weights.hf_weights(model, module))["wte.weight"]
        before = before.copy()
        trainer.step([ragged_batch(3)], lr, (0,))
        after = twin.weights.to_numpy(twin.weights.hf_weights(model, module))["wte.weight"]
        moved.append(float(np.abs(after - before).max()))
    # AdamW moves no weight further than about its rate.
    assert moved[0] == pytest.approx(1e-3, rel=0.01)
    assert moved[1] == 0.0
    assert 0.5e-4 < moved[2] < 2e-4


@pytest.mark.compiled
def test_reset_optimizer_forgets_moments_and_their_step_count(twin, tmp_path):
    model, module, _ = twin.weights.load_model(MODEL)
    trainer = twin.train.Trainer(model, weight_decay=0.0)
    batch = [ragged_batch(4)]
    trainer.step(batch, 0.0, (0,))
    twin.weights.save_moments(trainer.optimizer, module, tmp_path)
    once = load_file(tmp_path / "optimizer.safetensors")
    trainer.step(batch, 0.0, (0,))
    trainer.reset_optimizer()
    trainer.step(batch, 0.0, (0,))
    twin.weights.save_moments(trainer.optimizer, module, tmp_path)
    anew = load_file(tmp_path / "optimizer.safetensors")
    assert anew["step"] == once["step"] == 1
    for name, moment in once.items():
        # Not bitwise: within one process the last bit depends on where arrays lie in memory.
        # 2e-6 is a thousandth of a large first moment; what is not forgotten nearly doubles it.
        np.testing.assert_allclose(anew[name], moment, rtol=1e-4, atol=2e-6)


# ---- when things happen: a back end that only takes notes


class Notes:
    """Answers the protocol and remembers what was asked."""

    name = device = dtype = model_type = "notes"
    note, n_params, n_positions = "", 1, None

    def __init__(self, config, source):
        self.resets: list[int] = []
        self.steps: list = []
        self.loss = 1.0

    def compiled_in_words(self):
        return ""

    def train_step(self, micro_batches, lr, dropout_key, progress):
        self.steps.append((micro_batches, lr, dropout_key))
        return StepStats(self.loss, 1, 1.0)

    def eval_loss(self, batch):
        raise AssertionError("not evaluated here")

    def reset_optimizer(self):
        self.resets.append(len(self.steps))

    def save(self, directory, with_optimizer):
        (directory / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """Runs a configuration on `Notes` without evaluation and gives these back."""
    monkeypatch.setattr(Runner, "_evaluation_due", lambda self, epoch: False)

    def run(**keys):
        runner = Runner(run_config(tmp_path, **keys), Notes, "notes")
        runner.train()
        return runner.backend

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "resets"),
    # Two epochs a stage, one update an epoch; the start is no reset.
    [("never", []), ("stage", [2, 4]), ("epoch", [1, 2, 3, 4, 5]), (True, [1, 2, 3, 4, 5])],
)
def test_optimizer_is_reset_never_by_stage_or_by_epoch(noted, when, resets):
    notes = noted(reset_optimizer=when, epochs_per_stage=2, num_epochs=6)
    assert notes.resets == resets


def test_reset_by_stage_of_a_run_that_skips_epochs(noted):
    assert noted(reset_optimizer="stage", epochs_per_stage=2, num_epochs=6, resume=2).resets == [2]


def test_every_update_has_a_dropout_key_and_a_rate_of_its_own(noted, tmp_path):
    notes = noted(
        batch_size_training=2, num_epochs=3, warmup_updates=4, lr_schedule="linear", seed=5
    )
    keys = [key for _, _, key in notes.steps]
    assert len(keys) == len(set(keys)) == 12
    config = run_config(tmp_path, warmup_updates=4, lr_schedule="linear")
    assert [lr for _, lr, _ in notes.steps] == [learning_rate(config, u, 12) for u in range(12)]


def test_every_item_is_trained_once_an_epoch_in_a_new_order(noted):
    notes = noted(batch_size_training=3, gradient_accumulation_steps=2, num_epochs=2)
    groups = [[batch.idx for batch in batches] for batches, _, _ in notes.steps]
    assert [[len(idx) for idx in group] for group in groups] == [[3, 3], [2]] * 2
    first, second = (np.concatenate([*groups[i], *groups[i + 1]]).tolist() for i in (0, 2))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_non_finite_loss_stops_with_step_and_items(noted, monkeypatch, tmp_path):
    step = Notes.train_step

    def diverge(self, *rest):
        self.loss = float("nan") if len(self.steps) == 3 else 1.0
        return step(self, *rest)

    monkeypatch.setattr(Notes, "train_step", diverge)
    with pytest.raises(UserError) as error:
        noted(batch_size_training=4, num_epochs=3)
    (event,) = read_log(run_config(tmp_path), "non_finite")
    assert (event["epoch"], event["step"], len(event["items"])) == (2, 2, 4)
    text = str(error.value)
    assert "loss nan at epoch 2, step 2" in text and str(event["items"]) in text
    assert (tmp_path / "runs/tiny/epoch_01").is_dir()
    assert not (tmp_path / "runs/tiny/epoch_02").exists()


def test_diverged_weights_stop_the_run(twin, tmp_path):
    config = run_config(tmp_path, lr=1e30, eval_every=9, num_epochs=5)
    with pytest.raises(UserError, match=r"epoch \d, step 1, items \["):
        start(twin, config).train()


# ---- schedules


def rates(tmp_path, total: int, **keys) -> list[float]:
    config = run_config(tmp_path, lr=1.0, **keys)
    return [learning_rate(config, update, total) for update in range(total)]


def test_warm_up_is_linear_and_ends_at_the_full_rate(tmp_path):
    assert rates(tmp_path, 6, warmup_updates=4) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_and_cosine_schedules_fall_to_0_at_the_end(tmp_path):
    linear = rates(tmp_path, 6, warmup_updates=2, lr_schedule="linear")
    assert linear == [0.5, 1, 1, 0.75, 0.5, 0.25]
    cosine = rates(tmp_path, 4, lr_schedule="cosine")
    assert cosine == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    config = run_config(tmp_path, lr=1.0, lr_schedule="linear")
    assert learning_rate(config, 9, 4) == 0.0


# ---- traces


@pytest.mark.slow
@pytest.mark.compiled
def test_an_epoch_of_bucketed_lengths_is_traced_a_few_times(twin, tmp_path, monkeypatch, capsys):
    write_items(tmp_path / "train.json", 48)
    config = run_config(
        tmp_path, batch_size_training=4, pad_multiple=32, num_epochs=2, eval_every=9
    )
    runner = start(twin, config)
    shapes = []
    step = runner.backend.train_step
    monkeypatch.setattr(
        runner.backend,
        "train_step",
        lambda batches, *rest: shapes.extend(b.shape_key for b in batches) or step(batches, *rest),
    )
    monkeypatch.setattr(runner, "_evaluation_due", lambda epoch: False)
    runner.train()
    assert len(shapes) == 24
    assert len(set(shapes)) <= 6
    # One trace a shape and one for each optimizer's update (a stage has its own).
    most = len(set(shapes)) + 2 if twin.__name__ == "mlx_coconut" else 0
    assert runner.backend.n_traces() <= most
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("compiled ")]
    n_said = sum(int(line.split()[1]) for line in said)
    assert n_said == runner.backend.n_traces() and bool(said) is (twin.__name__ == "mlx_coconut")


# ---- all of it


@pytest.mark.slow
def test_eight_items_are_learnt_by_heart_through_all_stages(twin, tmp_path):
    write_items(tmp_path / "train.json", 8)
    config = run_config(
        tmp_path,
        val_path=str(tmp_path / "train.json"),
        max_latent_stage=2,
        epochs_per_stage=15,
        num_epochs=60,
        lr=3e-3,
        eval_every=15,
        swap_test=False,
        max_new_tokens=32,
        debug=True,  # no checkpoints
    )
    start(twin, config).train()
    stages = [(e["stage"], e["answer"]["share"]) for e in read_log(config, "eval")]
    assert stages == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]


def test_gradient_norm_is_exact_for_large_matrices() -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_coconut.updates.train import norm_of

    large = np.full((50_260, 64), 0.5, np.float32)
    norm = norm_of({"a": mx.array(large)}).item()
    assert norm == pytest.approx(np.linalg.norm(large.astype(np.float64)), rel=1e-5)
