"""What the terminal shows and what the log keeps."""

import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.reporting.console import Console
from coconut.reporting.log import append

ROOT = Path(__file__).parents[2]


def said(kind: str, **fields) -> str:
    stream = io.StringIO()
    Console(stream=stream).event(kind, **fields)
    return stream.getvalue()


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


START = dict(
    backend="mlx_coconut",
    model="gpt2",
    n_params=124_442_112,
    dtype="float32",
    run="prosqa-coconut",
    seed=0,
)
EPOCH = dict(epoch=7, n_epochs=50, stage=1)


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        (
            "start",
            START,
            "mlx_coconut | gpt2 124.4M params | float32 | run prosqa-coconut | seed 0",
        ),
        (
            "train",
            EPOCH
            | dict(step=120, n_steps=559, loss=0.43123)
            | dict(tokens_per_second=1841.7, memory_bytes=5.12e9, eta_seconds=865),
            "epoch 07/50 stage 1 | step 0120/0559 | loss 0.4312 | 1,842 tok/s | 5.1 GB | eta 14m",
        ),
        (
            "eval",
            EPOCH | dict(loss=0.421, answer=(124, 300), cot=(38, 300)),
            "eval  07/50 stage 1 | loss 0.4210 | answer 41.3% (124/300) | cot 12.7% (38/300)",
        ),
        (
            "saved",
            dict(path=Path("runs/prosqa-coconut/epoch_07"), bytes=475_000_000),
            "saved runs/prosqa-coconut/epoch_07 | 475 MB",
        ),
        ("stage", dict(lr=1e-4, n_rows=17886, is_last=True), "stage | lr 0.0001 | n rows 17,886 |"),
        ("eval", dict(loss=None, answer=(0, 0)), "eval  | answer - (0/0)"),
        ("train", dict(loss=float("nan"), eta_seconds=float("inf")), "epoch | loss nan |"),
        ("note", dict(message="two\nlines"), r"note | two\nlines"),
        ("done", dict(eta_seconds=5400, seconds=12.34), "done | eta 1h30m | 12.3 s"),
    ],
)
def test_a_line_an_event_units_written(kind, fields, line):
    assert said(kind, **fields).startswith(line) and said(kind, **fields).count("\n") == 1


def test_the_log_keeps_every_field_as_json(tmp_path):
    with Console(tmp_path / "run", stream=io.StringIO()) as console:
        console.event("eval", **EPOCH, answer=(1, 4), path=tmp_path, loss=np.float32(0.5))
    [record] = log_of(tmp_path / "run")
    assert record.pop("time") > 1.7e9
    answer = {"n": 1, "of": 4, "share": 0.25}
    assert record == {
        **dict(event="eval", **EPOCH),
        **dict(answer=answer, path=str(tmp_path), loss=0.5),
    }


def test_a_name_that_is_no_unicode_is_still_shown_and_logged(tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with Console(tmp_path, stream=stream) as console:
        console.event("saved", path="run\udc80")
    assert stream.buffer.getvalue() == b"saved run\\udc80\n"
    assert log_of(tmp_path)[0]["path"] == "run\udc80"


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    with Console(tmp_path, stream=io.StringIO()) as console:
        console.event("train", loss=float("nan"), norms={"a": float("-inf"), "b": [1.0, 2.0]})
    [record] = log_of(tmp_path)
    assert record["loss"] is None and record["norms"] == {"a": None, "b": [1.0, 2.0]}
    assert record["_nonfinite"] == {"loss": "nan", "norms.a": "-inf"}


@settings(deadline=None)
@given(fields=st.dictionaries(st.sampled_from("abc"), st.text() | st.floats() | st.integers()))
def test_any_event_is_one_line_of_valid_json(tmp_path_factory, fields):
    run_dir = tmp_path_factory.mktemp("run")
    stream = io.StringIO()
    with Console(run_dir, stream=stream) as console:
        console.event("x", **fields)

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    [line] = (run_dir / "log.jsonl").read_bytes().split(b"\n")[:-1]
    assert json.loads(line, parse_constant=no_constant)["event"] == "x"
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        (b'{"event": "b", "lo', ["a", "log", "c"]),
        (b"\xff", ["a", "log", "c"]),
        (b'{"event": "b"}', ["a", "b", "c"]),
        (b"", ["a", "c"]),
    ],
)
def test_a_line_torn_by_a_kill_is_repaired(tmp_path, torn, kept):
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "a"}\n' + torn)
    with Console(tmp_path, stream=io.StringIO()) as console:
        console.event("c")
    assert [record["event"] for record in log_of(tmp_path)] == kept


def test_only_rank_zero_speaks(tmp_path):
    stream = io.StringIO()
    tracked = RunConfig(report_to="wandb")
    with Console(tmp_path / "run", rank=1, stream=stream, tracked=tracked) as console:
        console.event("train", loss=1.0)
        console.say("hello")
        console.table("t", ["a"], [[1]])
        with console.progress("x", 3) as bar:
            bar.advance(loss=1.0)
    assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Console(tmp_path / "run")


def test_a_table_lines_up():
    stream = io.StringIO()
    rows = [["coconut", 97.0, 300], ["cot", 7.5, 12000]]
    Console(stream=stream).table("results", ["method", "accuracy", "n"], rows)
    assert stream.getvalue().splitlines() == [
        "results",
        "  method   accuracy       n",
        "  -------  --------  ------",
        "  coconut   97.0000     300",
        "  cot        7.5000  12,000",
    ]
    Console(stream=stream).table("nothing", ["method"], [])


def test_numbers_that_are_written_out_line_up_and_words_among_them_do_not():
    stream = io.StringIO()
    rows = [["97.5", "", "0-2"], ["8.0", "1.2e-05", "2"]]
    Console(stream=stream).table("t", ["both %", "loss", "latents"], rows)
    assert stream.getvalue().splitlines()[1:] == [
        "  both %     loss  latents",
        "  ------  -------  -------",
        "    97.5           0-2",
        "     8.0  1.2e-05  2",
    ]


SHOW = """
from coconut.reporting.console import Console
console = Console()
with console.progress("epoch 07/50 stage 1", 3) as bar:
    for loss in (3.0, 2.0, 1.0):
        bar.advance(1, loss=loss)
        console.event("train", epoch=7, n_epochs=50, loss=loss, note="w" * 200)
"""


def show(stdout: int, **env: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env = {**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **env}
    return subprocess.Popen([sys.executable, "-c", SHOW], stdout=stdout, env=env)


def test_piped_output_is_plain_lines_without_bars():
    with show(subprocess.PIPE) as process:
        output = process.communicate()[0].decode()
    wide = "w" * 200
    assert output.splitlines() == [f"epoch 07/50 | loss {n}.0000 | note {wide}" for n in (3, 2, 1)]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_has_bars_and_colour_unless_refused(no_color):
    ours, theirs = pty.openpty()
    with show(theirs, NO_COLOR=no_color) as process:
        os.close(theirs)
        output = b""
        try:
            while piece := os.read(ours, 4096):
                output += piece
        except OSError:
            pass  # Linux ends a closed terminal with an error
    os.close(ours)
    assert process.returncode == 0
    text = output.decode()
    assert "3/3" in text and "loss 1.0000" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for n in (3, 2, 1):
        assert f"epoch 07/50 | loss {n}.0000 | note {'w' * 200}" in plain.replace("\r\n", "\n")
    has_colour = re.search(r"\x1b\[[0-9;]*3[0-9]", text) is not None
    assert has_colour == ("\x1b[1mepoch" in text) == (not no_color)


TABLE = """
from coconut.reporting.console import Console
Console().table("results", ["method", "accuracy"], [["coconut", 97], ["cot", 7]])
"""


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_table_is_ruled_on_a_terminal_only(no_color):
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env = {**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": no_color}
    subprocess.run([sys.executable, "-c", TABLE], stdout=theirs, env=env, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "───" in text and ("\x1b[" in text) == (not no_color)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"coconut +97\s+cot +7", plain)


def test_a_disk_that_takes_half_a_line_is_asked_for_the_rest_or_named():
    class Filling:
        """A file that takes three bytes at a time, and so many in all."""

        name, taken, room = "runs/x/log.jsonl", b"", 100

        def write(self, line: bytes) -> int:
            if len(self.taken) >= self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.taken += line[:3]
            return min(3, len(line))

    append(file := Filling(), b'{"event": "a"}\n')
    assert file.taken == b'{"event": "a"}\n'
    file.room = 20
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written: No space left"):
        append(file, b'{"event": "b"}\n')
