"""A run killed at any moment and started again gives bitwise what an unbroken one gives.

    python tests/run/test_resume.py TWIN CONFIG.yaml MOMENT

is the run that gets killed: it kills itself, by SIGKILL, at a moment named below.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHOSEN, few, load_twin
from tiny import REPOSITORY, read_log, run_config, start

import coconut.checkpoints.checkpoint
import coconut.run.curriculum_loop
import coconut.run.start
from coconut.config.keys import RunConfig
from coconut.config.reading import load_config
from coconut.errors import UserError
from coconut.files import hidden
from coconut.reporting.console import Console

MODEL = {
    "model_type": "gpt2",
    "n_positions": 256,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
}


def config_of(folder: Path, name: str, **keys) -> RunConfig:
    """Three epochs of four updates, with everything in it that a resumed run must remember."""
    model = folder / "model.json"
    model.write_text(json.dumps(MODEL))
    return run_config(
        folder,
        name=name,
        model_config_path=str(model),
        train_path=None,
        generate={"items": 16, "fresh": True, "nodes": 16, "max_hops": 4},
        batch_size_training=2,
        gradient_accumulation_steps=2,
        num_epochs=3,
        save_every=1,
        stage_mixing="batch",
        warmup_updates=3,
        lr_schedule="cosine",
        **keys,
    )


def kill(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: Any, name: str, number: int = 1, act: Callable = kill, when: str = "") -> None:
    """Run `act` in place of the number-th call (from 1) of owner.name.

    when: counts only calls whose first argument, a path, has this in its name.
    """
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        if when in (Path(args[0]).name if when else ""):
            calls.append(1)
            if len(calls) == number:
                return act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def tear_log(console, kind, **fields):
    console._log.write(b'{"event": "tra')
    kill()


def delete_half(directory, *rest, **options):
    (Path(directory) / "trainer_state.json").unlink()
    kill()


def kill_between_renames(runner) -> None:
    """After the old `last` has been moved away, before the new one takes its name."""
    rename = Path.rename

    def counted(path, target):
        if path.name.startswith(".last.partial") and Path(target).name == "last":
            if any(".last.replaced" in other.name for other in path.parent.iterdir()):
                kill()
        return rename(path, target)

    Path.rename = counted


def write_half(path, text):
    hidden(path, "partial").write_text(text[: len(text) // 2])
    kill()


# In this order they lead one run, killed at each, from its start to its third epoch.
MOMENTS: dict[str, Callable] = {
    "first_update": lambda run: on_call(run.backend, "train_step"),
    "weights_written": lambda run: on_call(coconut.checkpoints.checkpoint, "_seal", 2),
    "between_renames": kill_between_renames,
    "log_line_half_written": lambda run: on_call(Console, "record", 2, tear_log),
    "last_half_deleted": lambda run: on_call(
        shutil, "rmtree", act=delete_half, when="last.deleted"
    ),
    "update_inside_an_epoch": lambda run: on_call(run.backend, "train_step", 3),
    "epoch_saved_not_evaluated": lambda run: on_call(run, "_evaluate_epoch"),
    "evaluated_not_reported": lambda run: on_call(coconut.run.curriculum_loop, "report"),
    "evaluations_half_written": lambda run: on_call(
        coconut.run.start, "write_text", act=write_half, when="evaluations.json"
    ),
}
# The moments are the host's; a second twin need only show that its own state comes back.
FEW = ("update_inside_an_epoch", "epoch_saved_not_evaluated")


def child(twin: str, config: str, moment: str) -> None:
    """Run until the moment comes, or to the end."""
    runner = start(load_twin(twin), load_config(config))
    if moment != "never":
        MOMENTS[moment](runner)
    runner.train()


def run_until(moment: str, twin: str, config: RunConfig) -> None:
    """Start or continue a run in a process of its own."""
    path = Path(config.save_path) / f"{config.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config.to_yaml())
    # A process of its own for the unbroken run too: a library that other tests have loaded
    # may round differently.
    # Compiled, as users run it: what a trace remembers must not be what a checkpoint lacks.
    env = {name: value for name, value in os.environ.items() if name != "MLX_DISABLE_COMPILE"}
    run = subprocess.run(
        [sys.executable, __file__, twin, str(path), moment],
        env=env | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
        capture_output=True,
        text=True,
    )
    expected = 0 if moment == "never" else -signal.SIGKILL
    assert run.returncode == expected, f"until {moment}: {run.stdout}{run.stderr}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Callable[[str], tuple[Path, RunConfig]]:
    """twin -> (folder, configuration) of a run that nobody killed."""

    @cache
    def run(twin: str) -> tuple[Path, RunConfig]:
        folder = tmp_path_factory.mktemp(twin)
        config = config_of(folder, "unbroken")
        run_until("never", twin, config)
        return folder, config

    return run


def results(config: RunConfig) -> dict[str, object]:
    """All that a run computes, to the last bit."""
    last = config.run_dir / "epoch_03"
    steps = {json.dumps(record) for record in read_log(config, "train")}
    return {
        "updates": sorted(steps),
        "weights": (last / "model.safetensors").read_bytes(),
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "state": (last / "trainer_state.json").read_bytes(),
        "evaluations": (config.run_dir / "evaluations.json").read_bytes(),
        "predictions": (config.run_dir / "predictions.jsonl").read_bytes(),
        "names": sorted(path.name for path in config.run_dir.iterdir()),
    }


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_killed_again_and_again_equals_unbroken(unbroken, name):
    folder, config = unbroken(name)
    killed = config_of(folder, "killed")
    for moment in MOMENTS if name == CHOSEN[0] else FEW:
        run_until(moment, name, killed)
    assert not (killed.run_dir / "epoch_03").exists()
    run_until("never", name, killed)
    ours, expected = results(killed), results(config)
    assert len(expected["updates"]) == 12
    for what, value in expected.items():
        assert ours[what] == value, what


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_finished_run_started_again_does_nothing(unbroken, name):
    _, config = unbroken(name)
    before = results(config)
    n_lines = len(read_log(config, "train"))
    start(load_twin(name), config).train()
    assert results(config) == before
    assert len(read_log(config, "train")) == n_lines


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_more_epochs_go_on_from_the_last(unbroken, name):
    folder, config = unbroken(name)
    shutil.copytree(config.run_dir, folder / "runs/longer")
    longer = config_of(folder, "longer")
    longer.num_epochs = 4
    start(load_twin(name), longer).train()
    steps = [(r["epoch"], r["step"]) for r in read_log(longer, "train")]
    assert steps == [(epoch, step) for epoch in range(1, 5) for step in range(1, 5)]


@pytest.mark.slow
def test_an_epoch_trained_again_is_evaluated_again(unbroken):
    folder, config = unbroken(CHOSEN[0])
    shutil.copytree(config.run_dir, folder / "runs/again")
    again = config_of(folder, "again")
    shutil.rmtree(again.run_dir / "epoch_03")
    start(load_twin(CHOSEN[0]), again).train()
    assert [record["epoch"] for record in read_log(again, "eval")] == [1, 2, 3, 3]


@pytest.mark.parametrize("name", few(CHOSEN, 1))
def test_another_seed_is_refused_and_changes_nothing(unbroken, name):
    folder, config = unbroken(name)
    other = config_of(folder, "unbroken", seed=1)
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="seed 0, not 1"):
        start(load_twin(name), other)
    after = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    assert before == after


if __name__ == "__main__":
    child(*sys.argv[1:])
