"""A disk that fills up under a run: one line, status 2, and the same command goes on to the bit.

The disk is a small tmpfs in a mount namespace of its own, so that it is really full.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import CHOSEN, TWINS, few
from test_resume import config_of, results
from tiny import REPOSITORY

from coconut.config.keys import RunConfig

FREE = [1720, 0, 4, 8, 16, 40, 300, 860, 900, 1240, 2000, 2560]
"""Kilobytes that are left; a checkpoint takes 844, and a run keeps three and writes a fourth."""

# A disk of 16 MB with all but $2 KB taken; the run, twice; what it left, out of the namespace.
SCRIPT = """
mount -t tmpfs -o size=16m none "$1" || exit 77
mkdir "$1/killed"
[ "$3" = ro ] || head -c $((16384 - $2))K /dev/zero > "$1/ballast" 2> /dev/null
[ "$3" = ro ] && mount -o remount,ro "$1"
shift 3
"$@" > out1 2> err1; echo $? > rc1
mount -o remount,rw "$RUNS"; rm -f "$RUNS/ballast"
"$@" > out2 2> err2; echo $? > rc2
cp -r "$RUNS/killed" kept
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """twin -> (folder, results) of a run on a disk with room."""

    @cache
    def run(name: str) -> tuple[Path, dict[str, object]]:
        folder = tmp_path_factory.mktemp(name)
        config = config_of(folder, "unbroken")
        done = subprocess.run(command(name, config, folder), cwd=REPOSITORY, capture_output=True)
        assert done.returncode == 0, done.stderr
        return folder, results(config)

    return run


def command(name: str, config: RunConfig, folder: Path) -> list[str]:
    path = folder / f"{config.name}.yaml"
    path.write_text(config.to_yaml())
    return [sys.executable, "-m", TWINS[name], "run", str(path)]


def on_a_full_disk(name: str, folder: Path, free: int, kind: str = "rw") -> RunConfig:
    """Run on it, then again with room; folder then holds what was said, and the run as `kept`."""
    config = config_of(folder, "killed")
    runs = folder / "runs"
    runs.mkdir()
    given = [str(runs), str(free), kind, *command(name, config, folder)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", *given],
        cwd=folder,
        env={**os.environ, "RUNS": str(runs), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace of its own: {done.stderr.strip()}")
    shutil.rmtree(runs)
    (folder / "runs").mkdir()
    (folder / "kept").rename(config.run_dir)
    return config


def check(folder: Path, config: RunConfig, expected: dict[str, object]) -> None:
    said = (folder / "err1").read_text()
    assert (folder / "rc1").read_text() == "2\n", said
    assert said.count("\n") == 1 and "cannot be written" in said, said
    assert (folder / "rc2").read_text() == "0\n", (folder / "err2").read_text()
    ours = results(config)
    for what, value in expected.items():
        assert ours[what] == value, what


CASES = [(name, free) for name in CHOSEN for free in FREE]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of Linux")
@pytest.mark.parametrize(("name", "free"), few(CASES, 1))
def test_a_full_disk_is_one_line_and_then_the_run_goes_on_to_the_bit(
    unbroken, tmp_path, name, free
):
    _, expected = unbroken(name)
    check(tmp_path, on_a_full_disk(name, tmp_path, free), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, of Linux")
@pytest.mark.parametrize("name", CHOSEN)
def test_a_disk_to_be_read_only_is_one_line(unbroken, tmp_path, name):
    _, expected = unbroken(name)
    check(tmp_path, on_a_full_disk(name, tmp_path, 0, "ro"), expected)
    assert "Read-only" in (tmp_path / "err1").read_text()
