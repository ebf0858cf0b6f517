"""The example of docs/data_sets.md works as it is printed there, in a smaller size."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import REPOSITORY

from coconut.commands.run import main
from coconut.tasks import questions

PAGE = (REPOSITORY / "docs/data_sets.md").read_text(encoding="utf-8")
SMALLER = {
    "sums_sft.yaml": ["validation_items=20", "report=False"],
    "sums_latro.yaml": [
        *("validation_items=20", "report=False", "total_updates=2", "num_evaluations=1"),
        *("rloo_k=4", "per_device_train_batch_size=16", "rollout_batch_size=16"),
    ],
    "latro_preexperiment_gsm8k.yaml": [],
}
"""What the test adds to a command that runs this file."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files in it, and the run files of the repository."""
    (tmp_path / "coconut/tasks/questions").mkdir(parents=True)
    (tmp_path / "args").mkdir()
    (tmp_path / "args/models").symlink_to(REPOSITORY / "args/models")
    for path in (REPOSITORY / "args").glob("latro_pre*.yaml"):
        (tmp_path / "args" / path.name).symlink_to(path)
    (module,) = blocks("python")
    (tmp_path / "coconut/tasks/questions/sums.py").write_text(module)
    names = re.findall(r"^`(args/\w+\.yaml)`", PAGE, re.M)
    for name, text in zip(names, blocks("yaml"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    own = str(tmp_path / "coconut/tasks/questions")
    monkeypatch.setattr(questions, "__path__", [*questions.__path__, own])
    yield tmp_path
    sys.modules.pop("coconut.tasks.questions.sums", None)
    vars(questions).pop("sums", None)


@pytest.mark.slow
def test_the_example_makes_trains_and_evaluates(checkout, twin, capsys):
    (commands,) = blocks("sh")
    made, *runs = commands.strip().splitlines()
    assert made == "python -m coconut.tasks.questions.sums"
    importlib.import_module("coconut.tasks.questions.sums").make()
    for path in (checkout / "data/cache").iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: 60 if "train" in path.name else 8]))
    for command in runs:
        name, verb, *argv = shlex.split(command)
        assert (name, verb) == ("mlx-coconut", "run")
        argv += SMALLER[Path(argv[0]).name]
        if "only_eval=True" in argv:  # so short a run has no best: nothing was right
            argv.append("load_model_path=runs/sums-latro/update_0002")
        main(twin.__name__, twin.run.make_backend, argv)
        if "--check" in argv:
            assert "checked: no model was built" in capsys.readouterr().out
    kept = {path.name for path in (checkout / "runs").iterdir()}
    assert kept >= {"sums-sft", "sums-latro", "sums-eval", "sums-preexperiment"}
    found = json.loads((checkout / "runs/sums-eval/summary.json").read_text())
    assert (found["n"], found["split"], found["maj_k"]) == (8, "test", 8)
    assert found["data"] == "data/cache/sums_test.jsonl"
    assert set(found["rationales"]) == {"own", "shuffled", "empty"}
    assert json.loads((checkout / "runs/sums-latro/test.json").read_text())["n"] == 8
    pre = json.loads((checkout / "runs/sums-preexperiment/summary.json").read_text())
    # All of train: a pre-experiment holds nothing out.
    assert (pre["n"], pre["dataset_name"]) == (60, "sums")


def test_the_example_is_read_back_by_its_own_answer(checkout):
    importlib.import_module("coconut.tasks.questions.sums").make()
    sums = questions.load("sums")
    for item in sums.read(sums.FILES["test"]):
        assert sums.answer(sums.response(item), item) == item["groundtruth"]
        ones, tens = map(int, item["rationales"].split())
        assert str(10 * tens + ones % 10) == item["groundtruth"]


def test_the_page_names_every_part_a_data_set_needs_and_every_set_that_ships():
    for part in questions.REQUIRED:
        assert f"`{part}`" in PAGE
    for name in questions.names():
        assert f"| `{name}`" in PAGE
