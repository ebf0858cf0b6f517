"""A directory to start from: complete or not there, and its runs find what they read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TWINS

from coconut.commands.init import main
from coconut.commands.run import main as run

ROOT = Path(__file__).parents[2]
FILES = ("val_path", "test_path", "model_config_path", "load_model_path")


def refusal(capsys, directory: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        main("mlx_coconut", [str(directory)])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", TWINS)
def test_a_new_directory_holds_a_run_that_can_start(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(TWINS[name], ["x"])
    said = capsys.readouterr().out
    assert f"  cd x\n  {name}-coconut run args/tiny_coconut.yaml --check" in said
    monkeypatch.chdir("x")
    run(TWINS[name], lambda *_: None, ["args/tiny_coconut.yaml", "--check"])
    assert capsys.readouterr().out.startswith(f"{TWINS[name]} | ")


def test_its_runs_find_there_what_they_read_in_a_checkout(tmp_path) -> None:
    main("mlx_coconut", [str(tmp_path / "x")])
    runs = sorted((ROOT / "args").glob("*.yaml"))
    assert [p.name for p in sorted((tmp_path / "x/args").glob("*.yaml"))] == [p.name for p in runs]
    for path in runs:
        keys = yaml.safe_load(path.read_text())
        for name in (keys[key] for key in FILES if keys.get(key)):
            # What is made or downloaded is in neither, and what a run writes comes later.
            if (ROOT / name).exists() and not name.startswith("runs/"):
                assert (tmp_path / "x" / name).exists(), (path.name, name)
    assert not list((tmp_path / "x").rglob("*.py")) and not list(tmp_path.rglob("*_train.json"))


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_is_there_is_left_alone(kind, tmp_path, capsys) -> None:
    target = tmp_path / "x"
    if kind == "directory":
        target.mkdir()
        (target / "mine").write_text("precious")
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.rglob("*"))
    assert f"{target}: is there already" in refusal(capsys, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, capsys) -> None:
    copied, copyfile = [], shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 5:
            raise OSError(28, "No space left on device")
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert "cannot be written: No space left" in refusal(capsys, tmp_path / "x")
    assert len(copied) == 5 and list(tmp_path.iterdir()) == []
