"""Curves and results of runs: what is read, what is drawn, and that no run is harmed by it."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import few
from tiny import run_config, start

from coconut.config.reading import check_config
from coconut.errors import UserError
from coconut.reporting.curves import read_history
from coconut.reporting.drawing import INK
from coconut.reporting.panels import POINTS, panels_of
from coconut.reporting.report import Reporter, main, page, results, settings, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def train(epoch: int, step: int, loss: float, stage: int = 0, **more) -> dict:
    place = dict(epoch=epoch, n_epochs=4, stage=stage, step=step, n_steps=2)
    return dict(event="train", time=1.0, **place, loss=loss, grad_norm=1.0, **more)


def evaluation(epoch: int, answer: float, **more) -> dict:
    share = dict(n=round(answer * 10), of=10, share=answer)
    return dict(event="eval", epoch=epoch, n_epochs=4, stage=0, loss=1.0, answer=share, **more)


def run_directory(path: Path, events: list[dict], torn: str = "", **keys) -> Path:
    path.mkdir(parents=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (path / "log.jsonl").write_text(lines + torn)
    values = {"model_id": "gpt2", "method": "coconut", "val_path": __file__, "train_path": __file__}
    (path / "config.yaml").write_text(check_config(values | keys).to_yaml())
    return path


EVENTS = [train(1, 1, 3.0), train(1, 2, 2.0), evaluation(1, 0.5), train(2, 1, 1.5, stage=1)]


def test_a_curve_stands_at_its_epochs(tmp_path):
    run = read_history(run_directory(tmp_path / "a", EVENTS))
    assert run.curves["train/loss"].x == [0.5, 1.0, 1.5]
    assert run.curves["train/loss"].y == [3.0, 2.0, 1.5]
    assert (run.curves["eval/answer"].x, run.curves["eval/answer"].y) == ([1.0], [0.5])
    assert run.stages == [(0, 0), (1, 1)] and run.n_updates == 3 and run.notes == []


def test_what_a_resumed_run_did_again_counts_once(tmp_path):
    again = [train(1, 2, 2.5), evaluation(1, 0.7), train(2, 1, 1.0)]
    run = read_history(run_directory(tmp_path / "a", EVENTS + again))
    assert run.curves["train/loss"].y == [3.0, 2.5, 1.0]
    assert run.curves["eval/answer"].y == [0.7]


def test_a_log_that_counts_updates_alone_is_drawn_over_them(tmp_path):
    place = dict(time=1.0, n_steps=4)
    events = [dict(event="train", step=n, reward=float(n), **place) for n in (1, 2, 3)]
    share = dict(n=1, of=2, share=0.5)
    events[2:2] = [dict(event="eval", step=2, answer=share, **place)]
    run = read_history(run_directory(tmp_path / "a", [*events, events[-1]]))
    assert (run.curves["train/reward"].x, run.unit) == ([1.0, 2.0, 3.0], "update")
    assert (run.curves["eval/answer"].x, run.n_updates) == ([2.0], 3)
    text = page([run])
    assert ">update<" in text and ">epoch<" not in text and "50.0 as asked, update 2" in text


def test_damaged_lines_are_left_out_and_told_in_one_line(tmp_path):
    run_dir = run_directory(tmp_path / "a", EVENTS, torn='[1]\n\n{"event": "train", "ep')
    run = read_history(run_dir)
    assert run.curves["train/loss"].y == [3.0, 2.0, 1.5]
    expected = f"{run_dir / 'log.jsonl'}: 2 lines are damaged and left out (the first is 5)"
    assert run.notes == [expected] and expected in page([run])


@pytest.mark.parametrize("value", few(["NaN", "Infinity", '"x"', "null", "true", "[]"], 2))
def test_what_is_no_finite_number_is_no_point(tmp_path, value):
    line = f'{{"event": "train", "epoch": 2, "step": 2, "n_steps": 2, "loss": {value}}}\n'
    run = read_history(run_directory(tmp_path / "a", EVENTS, torn=line))
    assert run.curves["train/loss"].y == [3.0, 2.0, 1.5] and run.notes == []
    assert "<svg" in page([run])


def test_unreadable_settings_are_told_and_the_curves_still_drawn(tmp_path):
    run_dir = run_directory(tmp_path / "a", EVENTS)
    (run_dir / "config.yaml").write_text("a: [")
    (run_dir / "summary.json").write_text("{")
    run = read_history(run_dir)
    assert [Path(note.split(":")[0]).name for note in run.notes] == ["config.yaml", "summary.json"]
    assert page([run]).count("<figure") == 3


def test_all_runs_that_cannot_be_read_are_named(tmp_path):
    run_directory(tmp_path / "a", EVENTS)
    names = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    with pytest.raises(UserError) as error:
        write_report(names, tmp_path / "x.html")
    assert len(error.value.problems) == 2 and not (tmp_path / "x.html").exists()
    assert all(str(names[i]) in error.value.problems[i - 1] for i in (1, 2))


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    run = read_history(run_directory(tmp_path / "a <b>", EVENTS))
    text = page([run])
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), addresses
    assert "<script" not in text and "@import" not in text and "<link" not in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and INK not in text
    assert "a &lt;b&gt;" in text and "<b>" not in text


@pytest.mark.slow
def test_only_a_run_that_still_trains_reads_itself_again(tmp_path):
    run = read_history(run_directory(tmp_path / "a", EVENTS))
    assert 'http-equiv="refresh"' in page([run], is_live=True)
    assert "refresh" not in page([run])


def test_quantities_logged_a_thought_share_a_panel(tmp_path):
    events = [train(1, s, 1.0, thought_norm=[5.0] * 11, lr=0.1) for s in (1, 2)]
    titles = {p.title: p for p in panels_of([read_history(run_directory(tmp_path / "a", events))])}
    assert list(titles) == ["Loss", "Gradient norm", "Thought norm"]
    assert [word for _, word in titles["Thought norm"].series] == [str(i) for i in range(1, 12)]


def test_thoughts_of_an_evaluation_are_drawn_a_line_a_latent(tmp_path):
    def thoughts(epoch, *scale):
        return {"event": "thoughts", "epoch": epoch, "scale": scale, "step_cosine": [None, 0.5]}

    events = [train(1, 1, 1.0), evaluation(1, 0.5), thoughts(1, 2.0, 3.0), train(2, 1, 1.0)]
    events += [evaluation(2, 0.5), thoughts(2, 9.0, 9.0)]
    resumed = [evaluation(2, 0.6), thoughts(2, 4.0, 5.0)]  # in place of the second evaluation
    run = read_history(run_directory(tmp_path / "a", events + resumed))
    assert run.curves["eval/answer"].y == [0.5, 0.6]
    assert run.curves["thoughts/scale.2"].y == [3.0, 5.0]
    panels = {panel.title: panel for panel in panels_of([run])}
    assert panels["Scale of a thought"].unit == "rms over that of an embedding"
    assert [word for _, word in panels["Scale of a thought"].series] == ["1", "2"]
    assert [word for _, word in panels["A thought and the one before"].series] == ["2"]


def test_a_long_curve_keeps_its_mean_and_range(tmp_path):
    from coconut.reporting.curves import Curve
    from coconut.reporting.panels import _thinned

    values = [float((7 * i) % 101) for i in range(20 * POINTS)]
    curve = Curve([float(i) for i in range(len(values))], values)
    x, mean, least, most = _thinned(curve)
    assert len(x) == len(mean) == POINTS and x[-1] == curve.x[-1]
    assert sum(mean) / POINTS == pytest.approx(sum(values) / len(values))
    assert min(least) == 0 and max(most) == 100


def test_settings_that_differ_and_results_stand_side_by_side(tmp_path):
    a = run_directory(tmp_path / "a", EVENTS, lr=0.1, generate={"items": 5, "nodes": 9})
    more = [evaluation(2, 0.9), evaluation(3, 0.8)]
    b = run_directory(tmp_path / "b", EVENTS + more, lr=0.2, generate={"items": 5, "nodes": 8})
    runs = [read_history(path) for path in (a, b)]
    assert settings(runs) == (
        ["key", "a", "b"],
        [["generate.nodes", "9", "8"], ["lr", "0.1", "0.2"]],
    )
    columns, rows = results(runs)
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["asked %"] for row in found] == ["50.0", "80.0"]
    assert found[1]["best %"] == "90.0 as asked, epoch 2" and found[1]["epoch"] == "3 of 4"


def test_one_run_is_compared_with_the_defaults(tmp_path):
    run = read_history(run_directory(tmp_path / "a", EVENTS, lr=0.1))
    assert ["lr", "0.1", "0.0001"] in settings([run])[1]


@pytest.mark.slow
def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, capsys):
    paths = [run_directory(tmp_path / folder / "run", EVENTS) for folder in ("x", "y")]
    main([*map(str, paths), "--out", str(tmp_path / "both.html")])
    assert all(str(path) in (tmp_path / "both.html").read_text() for path in paths)
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    assert f"wrote {tmp_path / 'both.html'}" in capsys.readouterr().out


def test_a_run_that_only_evaluated_has_its_results(tmp_path, capsys):
    run_dir = run_directory(tmp_path / "a", [])
    (run_dir / "summary.json").write_text('{"accuracy": 0.25, "n": 8}')
    main([str(run_dir)])
    assert "25.0" in capsys.readouterr().out
    assert "25.0" in (run_dir / "report.html").read_text()
    assert not (run_dir / "report.png").exists()


def test_a_page_must_be_named_so(tmp_path, capsys):
    run_dir = run_directory(tmp_path / "a", EVENTS)
    with pytest.raises(SystemExit) as stop:
        main([str(run_dir), "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2 and "ends in .html" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    run_dir = run_directory(tmp_path / "a", EVENTS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        main([str(run_dir)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install matplotlib" in error
    assert not (run_dir / "report.html").exists()


# --- beside a run ---


@pytest.mark.slow
def test_a_training_run_draws_its_curves(tmp_path, twin):
    config = run_config(tmp_path, report=True, num_epochs=1)
    start(twin, config).train()
    assert (config.run_dir / "report.png").read_bytes().startswith(PNG)
    text = (config.run_dir / "report.html").read_text()
    assert text.count("<figure") == 4 and "refresh" not in text


def fake_python(tmp_path: Path, script: str) -> str:
    """An interpreter that runs this shell script instead."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo noise >&2; echo 'matplotlib: cannot be imported' >&2; exit 2", "cannot be imported"),
        ("kill -9 $$", "status -9"),
        ("exit 1", "status 1"),
    ],
)
def test_a_drawing_that_fails_is_told_once_and_not_tried_again(tmp_path, monkeypatch, script, line):
    count = f"echo >> {tmp_path / 'count'}\n"
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, count + script))
    said: list[str] = []
    reporter = Reporter(tmp_path, said.append)
    reporter.draw()
    while reporter._child.poll() is None:
        time.sleep(0.01)
    reporter.draw()
    reporter.draw()
    reporter.finish()
    assert len(said) == 1 and line in said[0] and "\n" not in said[0]
    assert (tmp_path / "count").read_text() == "\n"


def test_a_missing_interpreter_is_told_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    said: list[str] = []
    Reporter(tmp_path, said.append).finish()
    assert len(said) == 1 and "cannot be started" in said[0]


def test_a_run_never_waits_for_a_drawing_but_its_last(tmp_path, monkeypatch):
    slow = 'case "$*" in *--live*) exec sleep 60;; *) exit 0;; esac'
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, slow))
    said: list[str] = []
    reporter = Reporter(tmp_path, said.append)
    before = time.perf_counter()
    reporter.draw()
    first = reporter._child
    reporter.draw()  # one at a time
    assert reporter._child is first
    reporter.finish()
    assert time.perf_counter() - before < 10 and said == []


def test_the_last_drawing_is_waited_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path, "exec sleep 60"))
    monkeypatch.setattr("coconut.reporting.report.LAST_WAIT", 0.05)
    said: list[str] = []
    Reporter(tmp_path, said.append).finish()
    assert len(said) == 1 and "took more than" in said[0]
