"""Two starts of one run: one trains, the other is told by whom, and touches nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CHOSEN, TWINS, few, load_twin
from test_start import LOOPS
from tiny import REPOSITORY, read_log, run_config

from coconut.commands.run import start_run
from coconut.errors import UserError
from coconut.files import HOST
from coconut.lock import LOCK, held
from coconut.world import World

TWIN = load_twin(CHOSEN[0])
NO_PROCESS = 2**22 + 1


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start(config: Any) -> None:
    start_run(config, TWIN.run.make_backend, TWIN.__name__, World())


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_every_kind_of_run_is_refused_where_another_is_at_work(make, tmp_path):
    config = make(tmp_path)
    with held(config.run_dir), pytest.raises(UserError) as refused:
        start(config)
    assert str(refused.value).startswith(f"{config.run_dir}: is written by process {os.getpid()}")
    assert f" on {HOST} since 20" in str(refused.value)
    assert not config.run_dir.exists()  # it was made by the lock, and held nothing else


def test_what_the_second_finds_it_leaves_as_it_is(tmp_path):
    (tmp_path / "epoch_01").mkdir()
    with held(tmp_path):
        before = (tmp_path / LOCK).read_bytes()
        with pytest.raises(UserError, match="is written by process"), held(tmp_path):
            pass
        assert names(tmp_path) == [LOCK, "epoch_01"]
        assert (tmp_path / LOCK).read_bytes() == before
    assert names(tmp_path) == ["epoch_01"]


def test_a_run_that_is_done_or_refused_leaves_no_lock(tmp_path):
    config = run_config(tmp_path, num_epochs=1, load_model_path=str(tmp_path))
    with pytest.raises(UserError):
        start(config)
    assert not config.run_dir.parent.exists()
    start(config := run_config(tmp_path, num_epochs=1))
    assert names(config.run_dir)[0] == "config.yaml"
    with held(config.run_dir):
        pass


def test_what_a_killed_run_left_locks_nobody_out(tmp_path):
    code = "import os, sys; from pathlib import Path; from coconut.lock import held\n"
    code += "with held(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env)
    assert done.returncode == -signal.SIGKILL and names(tmp_path) == [LOCK]
    with held(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_a_lock_that_is_taken_away_while_one_waits_for_it_is_opened_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, how):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()  # by its owner, who is done
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(tmp_path):
        assert len(calls) == 2 and names(tmp_path) == [LOCK]


@pytest.mark.parametrize(
    ("owner", "is_taken"),
    [
        (f"{HOST} {NO_PROCESS} 1700000000\n", False),
        (f"{HOST} {os.getppid()} 1700000000\n", True),
        (f"another_host {NO_PROCESS} 1700000000\n", True),
        ("", True),
        ("what is this", True),
        (f"{HOST} ² 9{'9' * 30}\n", True),
    ],
)
def test_a_disk_without_locks_goes_by_what_the_file_says(tmp_path, monkeypatch, owner, is_taken):
    def refused(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with held(tmp_path):
        assert names(tmp_path) == [LOCK]
    (tmp_path / LOCK).write_text(owner)
    if not is_taken:
        with held(tmp_path):
            pass
        assert names(tmp_path) == []
        return
    with pytest.raises(UserError, match=rf"no locks: if that process has ended, delete .*{LOCK}"):
        with held(tmp_path):
            pass
    assert (tmp_path / LOCK).read_text() == owner


PAIRS = [(a, b) for a in CHOSEN for b in CHOSEN]


@pytest.mark.parametrize(
    ("first", "second", "number"), few([(*pair, n) for pair in PAIRS for n in range(5)], 1)
)
def test_of_two_starts_at_once_one_trains_and_the_other_is_told(tmp_path, first, second, number):
    config = run_config(tmp_path, num_epochs=10_000, save_every=1, keep_checkpoints=1)
    (path := tmp_path / "run.yaml").write_text(config.to_yaml())
    started = [
        subprocess.Popen(
            [sys.executable, "-m", TWINS[name], "run", str(path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in (first, second)
    ]
    try:
        while all(process.poll() is None for process in started):
            time.sleep(0.05)
        (told,) = [process for process in started if process.poll() is not None]
        (winner,) = [process for process in started if process is not told]
        said = told.communicate()
        while not (config.run_dir / "epoch_01").exists() and winner.poll() is None:
            time.sleep(0.05)
        winner.send_signal(signal.SIGINT)
        out = winner.communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
    assert told.returncode == 2 and said[0] == "" and said[1].count("\n") == 1, said
    assert f"is written by process {winner.pid} on {HOST}" in said[1]
    assert winner.returncode == 130, out
    updates = [(record["epoch"], record["step"]) for record in read_log(config, "train")]
    assert len(read_log(config, "start")) == 1 and len(updates) == len(set(updates)) > 0
