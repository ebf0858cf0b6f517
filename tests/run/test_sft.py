"""SFT over a data set: what is trained on, what chooses the best epoch, when the test is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from tiny import data_set_config, read_log

from coconut.batches.curriculum import IGNORED
from coconut.batches.questions import DataSet
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.plan.plan import print_plan
from coconut.run.sft_loop import SftRunner

LOSS_GAP = 1e-4
"""Between the twins' losses of three updates at most; seen: 4e-6. Adam divides each gradient by its
own size, so the noise of float32 sums grows from 1e-7 by some hundreds."""


def sft(folder, **keys) -> RunConfig:
    values = {
        "method": "sft",
        "name": "sft",
        "num_epochs": 3,
        "batch_size_training": 6,
        "gradient_accumulation_steps": 3,
        "lr": 0.01,
        "report": False,
    }
    return data_set_config(folder, **(values | keys))


def start(name: str, config: RunConfig) -> SftRunner:
    twin = load_twin(name)
    return SftRunner(config, twin.run.make_backend, twin.__name__)


def test_targets_are_the_assistants_text_and_its_end(tmp_path):
    runner = start(CHOSEN[0], sft(tmp_path))
    runner.console.close()
    batch = runner._batch(runner.data.samples(0), np.arange(18), 0, 0, 0, 18)
    tokenizer, labels = runner.tokenizer, batch.labels
    for row, target, idx in zip(batch.ids, labels, batch.idx, strict=True):
        item = runner.questions.data.read(runner.config.train_path)[idx]
        said = target[target != IGNORED].tolist()
        written = [item["rationales"]] if "rationales" in item else []
        text = "\n".join([*written, f"={item['groundtruth']}"])
        assert said == [*tokenizer.encode(text), runner.questions.end_id]
        prompt = row[: np.argmax(target != IGNORED)].tolist()
        assert tokenizer.decode(prompt).endswith(f"{item['question']}:\nassistant\n")


@pytest.mark.compiled
def test_both_twins_train_alike_and_are_judged_on_what_was_held_out(tmp_path):
    found = []
    for name in CHOSEN:
        config = sft(tmp_path, name=name)
        runner = start(name, config)
        trained = {s.idx for s in runner.data.samples(0)}
        assert trained.isdisjoint(s.idx for s in runner.val) and len(trained) == 18
        runner.train()
        losses = [r["loss"] for r in read_log(config, "train")]
        assert losses[-1] < losses[0]
        lines = (config.run_dir / "predictions.jsonl").read_text().splitlines()
        assert {json.loads(line)["idx"] for line in lines} == {s.idx for s in runner.val}
        found.append(losses)
    np.testing.assert_allclose(found[-1], found[0], atol=LOSS_GAP)


def test_the_test_split_is_read_once_at_the_end_by_the_best_epoch(twin, tmp_path, monkeypatch):
    read, restored, numbered = [], [], DataSet.numbered

    def watched(self, split):
        read.append(split)
        return numbered(self, split)

    monkeypatch.setattr(DataSet, "numbered", watched)
    config = sft(tmp_path, test_at_end=True, num_epochs=2)
    runner = SftRunner(config, twin.run.make_backend, twin.__name__)
    monkeypatch.setattr(runner.backend, "restore", restored.append)
    evaluations = iter([0.5, 0.25])
    evaluate = runner._evaluate

    def scripted(stage, title):
        result = evaluate(stage, title)
        result.summary["accuracy"] = next(evaluations)
        return result

    monkeypatch.setattr(runner, "_evaluate", scripted)
    runner.train()
    assert read == ["validation", "train", "test"]
    assert [path.name for path in restored] == ["epoch_01"]
    written = (config.run_dir / "test.json").read_text()
    found = json.loads(written)
    assert found["n"] == 6 and found["data"] == config.test_path
    again = SftRunner(config, twin.run.make_backend, twin.__name__)
    again.train()
    assert read[3:] == ["validation", "train", "test"]  # checked, not asked again
    assert (config.run_dir / "test.json").read_text() == written


def test_a_test_split_that_cannot_be_asked_is_refused_before_training(twin, tmp_path):
    config = sft(tmp_path, test_at_end=True)
    Path(config.test_path).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        SftRunner(config, twin.run.make_backend, twin.__name__)
    assert not config.run_dir.exists()
    with pytest.raises(UserError, match="not JSON"):
        print_plan(config, twin.__name__)


@pytest.mark.parametrize("name", ["sft_gsm8k", "sft_arc_challenge"])
def test_runs_that_ship_update_on_as_many_rows_as_published(monkeypatch, name):
    from tiny import REPOSITORY

    from coconut.config.reading import load_config

    monkeypatch.chdir(REPOSITORY)
    config = load_config(f"args/{name}.yaml")
    assert config.batch_size_training * config.gradient_accumulation_steps == 32
    assert (config.method, config.lr, config.num_epochs) == ("sft", 5e-7, 12)
