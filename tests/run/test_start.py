"""What all loops share: what a start says and logs, diverging, and the test split answered once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHOSEN, load_twin
from test_latro_runner import config as latro_config
from tiny import data_set_config, read_log, run_config, start

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.run.answering import evaluate_data_set
from coconut.run.latro.loop import LatroRunner
from coconut.run.latro.preexperiment import measure
from coconut.run.sft_loop import SftRunner

TWIN = load_twin(CHOSEN[0])
LORA = {"lora": {"rank": 2}}


def curriculum(folder: Path, **keys: Any) -> RunConfig:
    return run_config(folder, num_epochs=1, **keys)


def sft(folder: Path, **keys: Any) -> RunConfig:
    return data_set_config(folder, **({"method": "sft", "num_epochs": 1, "report": False} | keys))


def latro(folder: Path, **keys: Any) -> RunConfig:
    few = {"warm_start_updates": 1, "total_updates": 1, "num_evaluations": 0}
    return latro_config(folder, **(few | keys))


def evaluation(folder: Path, **keys: Any) -> RunConfig:
    return data_set_config(folder, **({"method": "latro", "only_eval": True} | keys))


def preexperiment(folder: Path, **keys: Any) -> RunConfig:
    return data_set_config(folder, **({"method": "preexperiment"} | keys))


LOOPS = {
    curriculum: lambda *run: start(TWIN, run[0]).train(),
    sft: lambda *run: SftRunner(*run).train(),
    latro: lambda *run: LatroRunner(*run).train(),
    evaluation: evaluate_data_set,
    preexperiment: measure,
}


def go(make: Any, config: RunConfig) -> None:
    LOOPS[make](config, TWIN.run.make_backend, TWIN.__name__)


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_every_loop_says_what_runs_and_logs_its_configuration(make, tmp_path, monkeypatch, capsys):
    make_backend = TWIN.run.make_backend

    def noting(*given: Any) -> Any:
        backend = make_backend(*given)
        backend.note = "BLAS: the one of this test"
        return backend

    monkeypatch.setattr(TWIN.run, "make_backend", noting)
    config = make(tmp_path)
    go(make, config)
    head, note = capsys.readouterr().out.splitlines()[:2]
    assert head.startswith(f"{TWIN.__name__} | gpt2 ")
    assert f"| run {config.name} | method {config.method}" in head
    assert head.endswith(f"| seed {config.seed}") and "trained" not in head
    assert note == "BLAS: the one of this test"
    first, *others = read_log(config, "start")
    assert not others and first["twin"] == TWIN.__name__ and first["continuing"] is None
    assert first["config"]["lr"] == config.lr and first["config"]["seed"] == config.seed


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, latro], ids=lambda make: make.__name__)
def test_a_loop_says_what_an_adapter_trains(make, tmp_path, capsys):
    begins = data_set_config(tmp_path, method="sft").model_id
    config = make(tmp_path, **LORA, model_id=begins, model_config_path=None, tokenizer=None)
    go(make, config)
    assert "M trained (lora) |" in capsys.readouterr().out.splitlines()[0]
    adapted = next(p for p in sorted(config.run_dir.iterdir()) if (p / "coconut.json").exists())
    go(evaluation, evaluation(tmp_path, name="of-adapter", load_model_path=str(adapted)))
    lines = capsys.readouterr().out.splitlines()
    assert any("M trained (lora) | " in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("make", [curriculum, sft, latro], ids=lambda make: make.__name__)
def test_a_loss_that_is_not_finite_is_an_event_and_one_line(make, tmp_path):
    rate = "warm_start_lr" if make is latro else "lr"
    config = make(tmp_path, **{rate: 1e30})
    config.num_epochs = 4  # the first update still has a loss
    with pytest.raises(UserError, match="not finite; lower"):
        go(make, config)
    (event,) = read_log(config, "non_finite")
    assert event["warm_start" if make is latro else "epoch"] >= 1


@pytest.mark.parametrize("make", [sft, latro], ids=lambda make: make.__name__)
def test_the_test_split_is_answered_once_and_that_is_said(make, tmp_path, capsys):
    config = make(tmp_path, test_at_end=True)
    go(make, config)
    (event,) = read_log(config, "test")
    written = (config.run_dir / "test.json").read_text()
    assert event["answer"]["of"] == json.loads(written)["n"] > 0
    capsys.readouterr()
    go(make, config)
    said = capsys.readouterr().out
    assert "test.json is there already: the test split is answered once for a run" in said
    assert (config.run_dir / "test.json").read_text() == written and len(
        read_log(config, "test")
    ) == 1


@pytest.mark.slow
def test_the_page_of_a_run_that_was_stopped_does_not_say_that_it_runs(tmp_path, monkeypatch):
    twin = load_twin(CHOSEN[0])
    runner = start(twin, run_config(tmp_path, report=True))
    monkeypatch.setattr(runner, "_prune", interrupted)  # behind the first epoch's evaluation
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    page = (runner.run_dir / "report.html").read_text()
    assert "drawn " in page and "still running" not in page


def interrupted() -> None:
    raise KeyboardInterrupt
