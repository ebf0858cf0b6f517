"""A run stopped in one twin goes on in the other, in place or through a converted checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import CHOSEN, few, load_twin
from tiny import read_log, run_config, start

from coconut.checkpoints.checkpoint import verify
from coconut.convert.read import read
from coconut.files import read_json
from convert import mlx_to_torch, torch_to_mlx

needs_both = pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")

LOSSES = 1e-5  # relative; 6.0e-7
NORMS = 2e-4  # relative; 5.7e-5, since MLX's CPU sum of a large array loses digits


def config(folder, name, num_epochs):
    """Four updates an epoch; moments live on through the stages, so that a lost one shows."""
    return run_config(
        folder,
        name=name,
        num_epochs=num_epochs,
        batch_size_training=2,
        reset_optimizer="never",
        eval_every=9,
    )


def last_epoch(run):
    """(loss, gradient norm) of the updates of the third epoch."""
    return [(e["loss"], e["grad_norm"]) for e in read_log(run, "train") if e["epoch"] == 3]


@needs_both
@pytest.mark.parametrize(("first", "second"), [("cuda", "mlx"), ("mlx", "cuda")])
@pytest.mark.slow
def test_run_stopped_in_one_twin_goes_on_in_the_other(tmp_path, capsys, first, second):
    unbroken = config(tmp_path, "unbroken", 3)
    start(load_twin(first), unbroken).train()
    expected = last_epoch(unbroken)

    stopped = config(tmp_path, "stopped", 3)
    shutil.copytree(unbroken.run_dir / "epoch_02", stopped.run_dir / "epoch_02")
    converted = config(tmp_path, "converted", 3)
    command = torch_to_mlx if first == "cuda" else mlx_to_torch
    command.main([str(unbroken.run_dir / "epoch_02"), str(converted.run_dir / "epoch_02")])
    said = capsys.readouterr().out
    assert "our checkpoint directory with optimizer and trainer state" in said

    for run in (stopped, converted):
        start(load_twin(second), run).train()
        ours = last_epoch(run)
        assert len(ours) == len(expected) == 4
        assert [loss for loss, _ in ours] == pytest.approx([e[0] for e in expected], rel=LOSSES)
        assert [norm for _, norm in ours] == pytest.approx([e[1] for e in expected], rel=NORMS)


@pytest.fixture
def trained(tmp_path, twin):
    """A checkpoint that `twin` saved after one epoch."""
    run = config(tmp_path, "run", 1)
    start(twin, run).train()
    return run.run_dir / "epoch_01"


def test_our_own_checkpoint_is_copied_whole(tmp_path, trained):
    torch_to_mlx.main([str(trained)])
    copy = trained.parent / "epoch_01-mlx"
    verify(copy)
    assert {p.name for p in copy.iterdir()} == {p.name for p in trained.iterdir()}
    for path in trained.iterdir():
        assert path.read_bytes() == (copy / path.name).read_bytes()


def test_weights_only_leaves_out_what_a_resumed_run_needs(tmp_path, trained):
    torch_to_mlx.main([str(trained), str(tmp_path / "slim"), "--weights-only"])
    verify(tmp_path / "slim")
    gone = {p.name for p in trained.iterdir()} - {p.name for p in (tmp_path / "slim").iterdir()}
    assert gone == {"optimizer.safetensors", "trainer_state.json"}


def test_our_own_checkpoint_says_everything_itself(trained, capsys):
    said = refusal(capsys, [str(trained), "--stage", "3", "--tokenizer", "gpt2"])
    assert "says itself what --tokenizer, --stage would: remove the options" in said


def damage_weights(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


def forget_moments(directory):
    (directory / "optimizer.safetensors").unlink()
    (directory / "checksums.json").unlink()


def forget_progress(directory):
    state = read_json(directory / "trainer_state.json")
    del state["n_updates"]
    (directory / "trainer_state.json").write_text(json.dumps(state))
    (directory / "checksums.json").unlink()


def swap_moments_for_weights(directory):
    shutil.copyfile(directory / "model.safetensors", directory / "optimizer.safetensors")
    (directory / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    few(
        [
            (damage_weights, "model.safetensors is changed"),
            (forget_moments, "optimizer.safetensors: cannot be read"),
            (forget_progress, "trainer_state.json: lacks n_updates"),
            (swap_moments_for_weights, "m.wte.weight: missing, expected (2597, 64)"),
        ],
        1,
    ),
)
def test_damaged_checkpoint_of_ours_is_refused(trained, capsys, change, message):
    change(trained)
    assert message in refusal(capsys, [str(trained)])
    assert [p.name for p in trained.parent.glob("*epoch_01*")] == ["epoch_01"]


@pytest.mark.slow
def test_checkpoint_without_a_trainer_converts_and_loads(tmp_path, trained, twin):
    """What ships: no moments. It becomes an official file and comes back for evaluation."""
    pytest.importorskip("torch")
    official = tmp_path / "checkpoint_1"
    mlx_to_torch.main([str(trained), "--official", str(official)])
    own = ["--config", str(trained), "--tokenizer", str(trained), "--max-latent-stage", "1"]
    torch_to_mlx.main([str(official), str(tmp_path / "back"), *own, "--stage", "0"])
    there, back = read(trained), read(tmp_path / "back")
    assert all(back.tensors[name].is_same(tensor) for name, tensor in there.tensors.items())
    assert back.coconut == there.coconut
    answers = []
    for path in (trained, tmp_path / "back"):
        run = run_config(
            tmp_path, name=path.name + "-eval", only_eval=True, load_model_path=str(path)
        )
        answers.append(start(twin, run).evaluate_once().predictions)
    assert answers[0] == answers[1]


def refusal(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        torch_to_mlx.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err
