"""A run directory with a damaged file: named with the remedy, or made anew where it can be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import CHOSEN, few, load_twin
from test_start import curriculum, go, latro, sft
from tiny import run_config, start

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.files import write_json
from coconut.run.saving import read_evaluations

TWIN = load_twin(CHOSEN[0])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("done")
    go(curriculum, run_config(folder))
    return folder


def again(done: Path, folder: Path) -> RunConfig:
    """A third epoch of it, in a folder of its own."""
    shutil.copytree(done / "runs", folder / "runs")
    config = run_config(done, num_epochs=3)
    config.save_path = str(folder / "runs")
    return config


@pytest.mark.parametrize(
    "content",
    few(
        [
            *(b"", b"[]", b"{", b"\xff", b'{"one": 1}', b'{"1": 5}', b'{"1": {"accuracy": true}}'),
            b'{"1": {"accuracy": 1.0, "loss": null}}',
        ],
        2,
    ),
)
def test_damaged_evaluations_are_made_anew_of_the_log(done, tmp_path, content):
    config = again(done, tmp_path)
    path = config.run_dir / "evaluations.json"
    before = json.loads(path.read_bytes())
    path.write_bytes(content)
    assert read_evaluations(config.run_dir) == before
    start(TWIN, config).train()
    after = json.loads(path.read_bytes())
    assert list(after) == ["1", "2", "3"] and {n: after[n] for n in before} == before


def test_of_damaged_evaluations_and_no_log_both_are_named(done, tmp_path):
    config = again(done, tmp_path)
    (config.run_dir / "evaluations.json").write_bytes(b"")
    (config.run_dir / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"evaluations\.json: damaged, and no log\.jsonl"):
        start(TWIN, config)


@pytest.mark.parametrize(
    "name", ["log.jsonl", "config.yaml", "evaluations.json", "summary.json", "predictions.jsonl"]
)
def test_a_folder_in_place_of_a_file_is_named_before_anything_is_trained(done, tmp_path, name):
    config = again(done, tmp_path)
    (config.run_dir / name).unlink()
    (config.run_dir / name).mkdir()
    before = {p: p.is_file() and p.read_bytes() for p in config.run_dir.rglob("*")}
    with pytest.raises(UserError, match=rf"{name}: .*move it away"):
        start(TWIN, config)
    assert {p: p.is_file() and p.read_bytes() for p in config.run_dir.rglob("*")} == before


@pytest.mark.parametrize("name", ["epoch_03", "last"])
def test_a_file_in_place_of_a_checkpoint_is_named_before_anything_is_trained(done, tmp_path, name):
    config = again(done, tmp_path)
    (config.run_dir / name).write_text("")
    with pytest.raises(UserError, match=rf"{name}: a file where .*move it away"):
        start(TWIN, config)


@pytest.mark.parametrize("file", ["trainer_state.json", "checksums.json", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"epoch": -1, "update_in_epoch": 0}'])
def test_of_a_damaged_checkpoint_the_remedy_is_named_and_helps(done, tmp_path, file, content):
    config = again(done, tmp_path)
    path = config.run_dir / "epoch_02" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"epoch_02.*delete it"):
        start(TWIN, config)
    shutil.rmtree(config.run_dir / "epoch_02")
    (runner := start(TWIN, config)).console.close()
    assert runner.epoch == 1


@pytest.mark.parametrize("field", ["seed", "epoch", "update_in_epoch", "n_updates"])
def test_a_state_that_lies_is_refused_though_its_checksum_holds(done, tmp_path, field):
    config = again(done, tmp_path)
    last = config.run_dir / "epoch_02"
    state = json.loads((last / "trainer_state.json").read_text())
    write_json(last / "trainer_state.json", state | {field: "2"})
    sums = json.loads((last / "checksums.json").read_text())
    del sums["files"]["trainer_state.json"]
    write_json(last / "checksums.json", sums)
    with pytest.raises(UserError, match=rf"expected .*{field}.*damaged; copy .*or delete it"):
        start(TWIN, config)


def staged(folder: Path, **keys) -> RunConfig:
    return run_config(folder, **keys)


@pytest.mark.parametrize(("loop", "make"), [(curriculum, staged), (sft, sft)])
def test_what_a_kill_between_saving_and_pruning_left_goes_when_the_run_is_started_again(
    loop, make, tmp_path
):
    keys = {"num_epochs": 2, "keep_checkpoints": 1, "save_every": 1}
    go(loop, config := make(tmp_path, **keys))
    run_dir = config.run_dir
    kept = sorted(path.name for path in run_dir.iterdir())
    for name in ("last", "epoch_01"):
        if not (run_dir / name).exists():
            shutil.copytree(run_dir / "epoch_02", run_dir / name)
    state = json.loads((run_dir / "epoch_02/trainer_state.json").read_text())
    write_json(run_dir / "last/trainer_state.json", state | {"epoch": 1, "update_in_epoch": 1})
    go(loop, make(tmp_path, **keys))
    assert sorted(path.name for path in run_dir.iterdir()) == kept


def test_so_it_is_in_latro(tmp_path):
    keys = {"total_updates": 2, "keep_checkpoints": 1, "save_steps": 1}
    go(latro, config := latro(tmp_path, **keys))
    shutil.copytree(config.run_dir / "update_0002", config.run_dir / "update_0001")
    go(latro, latro(tmp_path, **keys))
    assert not (config.run_dir / "update_0001").exists()
