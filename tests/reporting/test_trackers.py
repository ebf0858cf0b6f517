"""Trackers by name: each is opened when asked for, gets a run's numbers and is closed."""

from __future__ import annotations

import io
import sys
import types
from dataclasses import asdict

import pytest
import yaml
from conftest import CHOSEN, load_twin
from tiny import run_config, start

from coconut.config import keys
from coconut.config.keys import RunConfig
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError, guarded
from coconut.reporting.console import Console
from coconut.reporting.trackers import TRACKERS, open_tracker


@pytest.fixture
def seen(monkeypatch) -> list:
    """What stand-ins of every tracker are told, in order."""
    told: list = []
    run = types.SimpleNamespace(log=told.append, finish=lambda: told.append("closed"))
    for name in ("wandb", "trackio"):
        module = types.SimpleNamespace(init=lambda **settings: told.append(settings) or run)
        monkeypatch.setitem(sys.modules, name, module)

    class SummaryWriter:
        def __init__(self, logdir):
            told.append(logdir)

        def add_scalar(self, tag, value, step):
            told.append((tag, value, step))

        def close(self):
            told.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return told


def say_two_events(config) -> None:
    with Console(config.run_dir, stream=io.StringIO(), tracked=config) as console:
        console.event("start", run="a name")
        console.event("eval", epoch=1, answer=(1, 4), note="x", loss=float("inf"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers(seen, tmp_path, name):
    config = RunConfig(report_to=name, project="p", name="r", save_path=str(tmp_path))
    say_two_events(config)
    opened = {"project": "p", "name": "r", "config": asdict(config)}
    assert seen == [opened, {}, {"eval/epoch": 1, "eval/answer": 0.25}, "closed"]


def test_tensorboard_gets_the_numbers_at_the_number_of_the_event(seen, tmp_path):
    config = RunConfig(report_to="tensorboard", name="r", save_path=str(tmp_path))
    say_two_events(config)
    folder = str(tmp_path / "r" / "tensorboard")
    assert seen == [folder, ("eval/epoch", 1, 1), ("eval/answer", 0.25, 1), "closed"]
    # A run that goes on does not begin its curves anew.
    say_two_events(config)
    assert seen[4:] == [folder, ("eval/epoch", 1, 3), ("eval/answer", 0.25, 3), "closed"]


def test_a_run_reports_and_closes_its_tracker_at_its_end(seen, tmp_path):
    config = run_config(tmp_path, num_epochs=1, report_to="tensorboard")
    start(load_twin(CHOSEN[0]), config).train()
    tags = {one[0] for one in seen if isinstance(one, tuple)}
    assert {"train/loss", "eval/loss", "eval/answer"} <= tags
    assert seen.count("closed") == 1 and seen[-1] == "closed"


@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_tracker_ends_with_one_line_before_training(tmp_path, monkeypatch, capsys, name):
    package = TRACKERS[name][0]
    monkeypatch.setitem(sys.modules, package, None)
    config = run_config(tmp_path, report_to=name)
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: start(load_twin(CHOSEN[0]), config).train())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "epoch" not in out
    assert (
        err.count("\n") == 1
        and f"{name}: asked for but not installed: pip install {package}" in err
    )


def test_nothing_is_imported_unless_asked_for(seen, tmp_path):
    for changes in ({}, {"report_to": "wandb", "debug": True}):
        assert open_tracker(RunConfig(save_path=str(tmp_path), **changes)) is None
    assert seen == []


def test_every_value_of_the_key_has_a_tracker():
    assert ("none", *TRACKERS) == keys.TRACKERS


def test_wandb_true_says_the_same_as_report_to_wandb(tmp_path):
    values = yaml.safe_load(run_config(tmp_path).to_yaml())
    assert check_config(values).report_to == "none"
    for given in ({"wandb": True, "report_to": "wandb"}, {"report_to": "wandb"}):
        config = check_config(values | given)
        assert config.report_to == "wandb" and config.wandb
    del values["report_to"]
    assert check_config(values | {"wandb": True}).report_to == "wandb"
    with pytest.raises(UserError, match="report_to: trackio contradicts wandb: True"):
        check_config(values | {"wandb": True, "report_to": "trackio"})


def test_an_override_of_either_key_replaces_the_other(tmp_path):
    values = yaml.safe_load(run_config(tmp_path).to_yaml())
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values | {"report_to": "wandb"}))
    assert load_config(path, ["wandb=False"]).report_to == "none"
    assert load_config(path, ["report_to=trackio"]).wandb is False
    path.write_text(check_config(values | {"report_to": "wandb"}).to_yaml())
    assert load_config(path, ["report_to=none"]).report_to == "none"
