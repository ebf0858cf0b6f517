"""The command line: exit codes, one clear message, nothing written on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coconut.commands.run import main
from coconut.config.keys import RunConfig
from coconut.errors import UserError, guarded

ROOT = Path(__file__).parents[2]


def no_backend(config: RunConfig, source: object) -> None:
    raise AssertionError("a wrong configuration must not build a model")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A configuration that is right, with data of one item."""
    item = {"question": "Tom is a wumpus. Who?", "answer": "Tom", "steps": []}
    (tmp_path / "data.json").write_text(json.dumps([item]))
    values = {
        "method": "cot",
        "model_config_path": str(ROOT / "args" / "models" / "tiny_gpt2.json"),
        "tokenizer": "prosqa",
        "train_path": str(tmp_path / "data.json"),
        "val_path": str(tmp_path / "data.json"),
        "save_path": str(tmp_path / "runs"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    return tmp_path / "run.yaml"


def status(*argv: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main("mlx_coconut", no_backend, [str(arg) for arg in argv])
    return stopped.value.code


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_right_configuration_is_planned_and_ends_well(run: Path, capsys) -> None:
    main("mlx_coconut", no_backend, [str(run), "--check", "num_epochs=2"])
    out, err = capsys.readouterr()
    assert out.startswith("mlx_coconut | ") and err == ""
    assert names(run.parent) == ["data.json", "run.yaml"]


@pytest.mark.parametrize("flags", [[], ["--check"]])
@pytest.mark.parametrize(
    "override, message",
    [
        ("lr=fast", "{run}: lr: expected a number, got 'fast'"),
        ("sed=1", "{run}: sed: unknown key, did you mean seed?"),
        ("val_path=none.json", "{run}: val_path: no such file: none.json"),
        ("tokenizer=nothing", "nothing: no such tokenizer: give a directory"),
        ("method=recall", ""),
        ("val_path={run}", "{run}: line 1: "),
        ("generate.items=0", "{run}: generate.items: must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_on_stderr_status_2_and_no_file(
    run: Path, capsys, override: str, message: str, flags: list[str]
) -> None:
    if override == "method=recall":
        item = {"question": "Who?", "answer": "b", "steps": []}
        (run.parent / "data.json").write_text(json.dumps([item]))
        message = f"{run.parent}/data.json: item 0: no sentence to recall"
    if override.startswith("val_path={run}"):
        message = "{run}: expected a JSON list of items"
    before = names(run.parent)
    assert status(run, override.format(run=run), *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message.format(run=run))
    assert err.count("\n") == 1 and "Traceback" not in err
    assert names(run.parent) == before


def test_several_problems_take_a_line_each(run: Path, capsys) -> None:
    assert status(run, "lr=fast", "sed=1") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{run}: 2 problems",
        "  lr: expected a number, got 'fast'",
        "  sed: unknown key, did you mean seed?",
    ]


def test_help_names_every_key(capsys) -> None:
    assert status("--help") == 0
    out = capsys.readouterr().out
    for key in ("c_thought", "reset_optimizer (never, stage, epoch; stage)", "generate"):
        assert f"  {key}" in out


@pytest.mark.parametrize(
    "n_checkpoints, said", [(0, "starts anew"), (1, "continues from the last")]
)
def test_an_interrupt_says_how_to_go_on(run: Path, tmp_path, capsys, n_checkpoints, said) -> None:
    def interrupted(config: RunConfig, *args, **keys) -> None:
        for number in range(n_checkpoints):
            folder = config.run_dir / f"epoch_{number + 1:02d}"
            folder.mkdir(parents=True)
            (folder / "trainer_state.json").write_text('{"epoch": 1, "update_in_epoch": 0}')
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main("mlx_coconut", interrupted, [str(run), f"save_path={tmp_path}/r"])
    assert stopped.value.code == 130
    assert said in capsys.readouterr().err


def test_a_path_in_the_users_home_is_found(run: Path, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        main("mlx_coconut", no_backend, [str(run), "val_path=~/nothing.json"])
    assert f"{tmp_path}/nothing.json" in capsys.readouterr().err


def test_an_error_of_the_program_is_not_hidden() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(broken)


METAL = "[METAL] Command buffer execution failed: "


@pytest.mark.parametrize(
    "message, way_out",
    [
        (METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBuffer…)", "drawing the screen"),
        (METAL + "Insufficient Memory (00000008:kIOGPUCommandBuffer…)", "gradient_checkpointing"),
        ("[metal::malloc] Attempting to allocate 48318382080 bytes", "out of memory"),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", "eval_batch_size"),
        ("Cache thrashing is happening, please set …", "MLX_CUDA_GRAPH_CACHE_SIZE=2000"),
        ("[metal::load_device] No Metal device available", "device: cpu"),
    ],
)
def test_a_machine_at_its_limits_is_one_line_with_a_way_out(capsys, message, way_out) -> None:
    def failing() -> None:
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as stopped:
        guarded(failing)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and way_out in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize("make", [lambda: np.zeros(10**15), lambda: torch_zeros(10**15)])
def test_memory_that_cannot_be_had_is_one_line(capsys, make) -> None:
    with pytest.raises(SystemExit):
        guarded(make)
    assert capsys.readouterr().err.startswith("out of memory")


def torch_zeros(n: int):
    return pytest.importorskip("torch").zeros(n)


def test_a_message_that_cannot_be_encoded_is_printed_all_the_same(
    run: Path, tmp_path: Path
) -> None:
    # A file name may hold bytes that are no text; a terminal may know ASCII only.
    done = command(os.fsencode(tmp_path) + b"/\xff\xe9.yaml", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr and b"no such file" in done.stderr


def test_the_command_itself_exits_with_2_and_writes_nothing(run: Path) -> None:
    before = names(run.parent)
    done = command(os.fsencode(run), b"lr=fast")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"{run}: lr: expected a number, got 'fast'\n"
    assert names(run.parent) == before


def command(*argv: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_coconut.run", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        timeout=60,
    )


def test_a_user_error_reads_as_one_line_or_a_list() -> None:
    assert str(UserError("file", "wrong")) == "file: wrong"
    assert str(UserError("file", "a", "b")) == "file: 2 problems\n  a\n  b"
