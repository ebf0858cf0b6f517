"""A run that goes on: changed keys are said, and refused where they say what it is."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHOSEN, few, load_twin
from test_start import curriculum, go, latro, sft
from tiny import read_log, run_config, start

from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.plan.plan import print_plan

TWIN = load_twin(CHOSEN[0])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("done")
    go(curriculum, curriculum(folder))
    return folder


def again(done: Path, folder: Path, **keys: Any) -> RunConfig:
    """The same run with two epochs and other keys, in a folder of its own."""
    shutil.copytree(done / "runs", folder / "runs")
    config = run_config(done, **{"num_epochs": 2} | keys)
    config.save_path = str(folder / "runs")
    return config


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_changed_keys_are_said_logged_and_kept(done, tmp_path, capsys):
    config = again(done, tmp_path, lr=0.25, batch_size_training=4)
    start(TWIN, config).train()
    said = capsys.readouterr().out
    assert "changed: until now lr 0.001, not 0.25\n" in said
    assert "changed: until now batch_size_training 8, not 4\n" in said
    first, second = read_log(config, "start")
    assert first["changed"] == {}
    assert second["changed"]["lr"] == {"was": 0.001, "now": 0.25}
    assert set(second["changed"]) == {"lr", "batch_size_training", "num_epochs", "save_path"}
    assert yaml.safe_load((config.run_dir / "config.yaml").read_text())["lr"] == 0.25


OTHERS: dict[str, Any] = {
    "seed": 1,
    "method": "pause",
    "generate": {"items": 8, "nodes": 16, "max_hops": 4},
    "tokenizer": "bytes",
    "max_latent_stage": 2,
    "feedback": "norm",
    "lora": {"rank": 2},
    "val_path": "args/../data/prosqa_tiny.json",
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_key_that_says_what_the_run_is_is_refused(done, tmp_path, key):
    config = again(done, tmp_path)
    setattr(config, key, OTHERS[key])
    before = everything(tmp_path)
    for act in (lambda: start(TWIN, config), lambda: print_plan(config, TWIN.__name__)):
        with pytest.raises(UserError) as refused:
            act()
        (problem,) = refused.value.problems
        assert f"epoch_01 was trained with {key} " in problem
        assert problem.endswith("choose another name for a new run, or set resume_changed: True")
    assert everything(tmp_path) == before


def test_it_goes_on_if_that_is_wished_once(done, tmp_path, capsys):
    config = again(done, tmp_path, seed=1, max_latent_stage=2, resume_changed=True)
    start(TWIN, config).train()
    assert (config.run_dir / "epoch_02").is_dir()
    assert "changed: until now seed 0, not 1\n" in capsys.readouterr().out
    assert read_log(config, "start")[-1]["changed"]["max_latent_stage"] == {"was": 1, "now": 2}
    kept = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    assert kept["seed"] == 1 and "resume_changed" not in kept


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    few(
        [(sft, {"split_seed": 1}, "split_seed 0, not 1"), (latro, {"separator": " "}, "separator")],
        1,
    ),
)
def test_so_it_is_on_data_sets(make, keys, said, tmp_path):
    go(make, make(tmp_path))
    with pytest.raises(UserError, match=f"was trained with {said}"):
        go(make, make(tmp_path, **keys))


def test_an_evaluation_leaves_the_settings_of_the_training_beside_it(done, tmp_path):
    config = again(done, tmp_path)
    before = (config.run_dir / "config.yaml").read_bytes()
    checkpoint = str(config.run_dir / "epoch_01")
    evaluation = again(done, tmp_path / "e", only_eval=True, load_model_path=checkpoint)
    evaluation.save_path = config.save_path
    start(TWIN, evaluation).evaluate_once()
    assert (config.run_dir / "config.yaml").read_bytes() == before
    start(TWIN, config).train()
    assert set(read_log(config, "start")[-1]["changed"]) == {"num_epochs", "save_path"}


@pytest.mark.parametrize("text", [b"\xff", b"- a list", b"a: [", b"a: *b"])
def test_damaged_settings_are_named_with_the_remedy(done, tmp_path, text):
    config = again(done, tmp_path)
    path = config.run_dir / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"config\.yaml: .*; put it back, or move it away"):
        start(TWIN, config)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"config\.yaml: .*; put it back, or move it away"):
        start(TWIN, config)
    path.rmdir()
    start(TWIN, config).train()
    assert path.is_file()


def test_the_keys_of_what_a_run_is_are_named_in_the_reference():
    marked = {f.name for f in fields(LatroConfig) if f.metadata["identity"]}
    page = (Path(__file__).parents[2] / "docs/keys.md").read_text()
    rows = [line for line in page.splitlines() if "†" in line and line.startswith("| `")]
    assert {line.split("`")[1] for line in rows} == marked
    assert {"seed", "train_path", "stop_seqs"} <= marked and not {"lr", "name"} & marked
