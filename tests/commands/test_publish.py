"""Publishing a checkpoint: the card, what is sent, and what is said if it cannot be."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_standin import TOKEN, Hub, serving
from tiny import REPOSITORY, start

from coconut.checkpoints.checkpoint import describe
from coconut.checkpoints.hub import fetch
from coconut.checkpoints.named import checkpoint_config
from coconut.checkpoints.source import open_source
from coconut.commands import generate as ask
from coconut.commands.publish import main
from coconut.config.reading import load_config
from coconut.errors import typed
from coconut.files import read_json, write_json

SHIPPED = REPOSITORY / "data/checkpoints/prosqa"
REPO = "someone/made"

# The hub's client uploads this way; newer versions of its HTTP library warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "cache") as hub:
        # Xet would send the weights to servers that the stand-in is not.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "epoch_01"
    shutil.copytree(SHIPPED, directory)
    (directory / "optimizer.safetensors").write_bytes(b"moments")
    (directory / "trainer_state.json").write_text("{}")
    summary = {"accuracy": 0.25, "swapped_accuracy": 0.5, "both_accuracy": 0.125, "epoch": 1}
    summary |= {"backend": "mlx_coconut", "data": "/home/me/valid.json"}
    write_json(directory.parent / "summary.json", summary)
    settings(directory, model_id="owner/base", train_path="/home/me/train.json")
    return directory


def settings(directory: Path, **keys) -> None:
    """The config.yaml of the run that a checkpoint lies in."""
    keys = {"method": "coconut", "val_path": "data/prosqa_small_test.json"} | keys
    (directory.parent / "config.yaml").write_text(yaml.safe_dump(keys))


def shown(capsys, directory: Path, *options: str) -> str:
    """The card of a dry run, and what stands under it."""
    main("mlx_coconut", [str(directory), "--repo", REPO, "--dry-run", *options])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main("mlx_coconut", argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_dry_run_shows_card_and_files_and_sends_nothing(hub, checkpoint, capsys):
    said = shown(capsys, checkpoint)
    for part in ("| both_accuracy | 0.125 |", "Feedback rule: last", "Stage: 7", "cuda-coconut"):
        assert part in said
    for part in ("gpt2, 0.95 M weights", "Base model: owner/base", "base_model: owner/base"):
        assert part in said
    assert "Data: train.json" in said and "Measured on valid.json by mlx_coconut:" in said
    assert "/home/me" not in said and "license:" not in said
    assert "model.safetensors" in said and "optimizer" not in said and "trainer_state" not in said
    assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "second"])
@pytest.mark.slow
def test_what_was_published_can_be_fetched_and_opened(twin, hub, checkpoint, revision):
    branch = ["--revision", revision] if revision else []
    main(twin.__name__, [str(checkpoint), "--repo", REPO, "--private", *branch])
    assert hub.repos[REPO].private
    files = hub.repos[REPO].branches[revision or "main"][1]
    assert not files.keys() & {"optimizer.safetensors", "trainer_state.json", "checksums.json"}
    assert b"| swapped_accuracy | 0.5 |" in files["README.md"]
    back = fetch(REPO, revision)
    assert describe(back)["coconut"] == describe(checkpoint)["coconut"]
    weights = "model.safetensors"
    assert (back / weights).read_bytes() == (checkpoint / weights).read_bytes()
    one, two = (open_source(checkpoint_config(d)).tokenizer for d in (back, checkpoint))
    assert one.latent_id == two.latent_id
    assert one.encode_question("Is a b?") == two.encode_question("Is a b?")


def test_the_weights_of_a_trained_rule_are_sent_too(hub, checkpoint):
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "feedback.safetensors").write_bytes(b"rule")
    main("mlx_coconut", [str(checkpoint), "--repo", REPO])
    assert hub.repos[REPO].branches["main"][1]["feedback.safetensors"] == b"rule"


def test_the_commands_of_the_card_run_in_both_twins(twin, hub, checkpoint, tmp_path, capsys):
    main(twin.__name__, [str(checkpoint), "--repo", REPO])
    text = hub.repos[REPO].branches["main"][1]["README.md"].decode()
    (block,) = re.findall(r"```yaml\n(.+?)```", text, re.DOTALL)
    (tmp_path / "eval.yaml").write_text(block)
    items = json.loads((REPOSITORY / "data/prosqa_small_test.json").read_text())[:8]
    (tmp_path / "few.json").write_text(json.dumps(items))
    capsys.readouterr()
    for line in text.splitlines():
        if not line.startswith(f"    {typed(twin.__name__, '')}"):
            continue
        _, verb, *argv = shlex.split(line)
        if verb == "generate":
            argv[argv.index("...")] = items[0]["question"]
            ask.main(twin.__name__, twin.run.make_backend, argv)
            assert capsys.readouterr().out.strip() == f"### {items[0]['answer']}"
        else:
            (name,) = argv
            keys = [f"save_path={tmp_path}", f"val_path={tmp_path / 'few.json'}", "report=False"]
            config = load_config(str(tmp_path / name), keys)
            start(twin, config).evaluate_once()
            summary = json.loads((config.run_dir / "summary.json").read_text())
            assert (summary["n"], summary["checkpoint"]) == (8, REPO)
            assert summary["both_accuracy"] >= 0.75  # seen: 1


def test_results_nobody_measured_are_said_to_be_so(checkpoint, capsys):
    (checkpoint.parent / "summary.json").unlink()
    assert "Not measured." in shown(capsys, checkpoint)


def test_results_of_another_checkpoint_are_not_this_ones(checkpoint, capsys):
    summary = checkpoint.parent / "summary.json"
    write_json(summary, read_json(summary) | {"epoch": 2})
    assert "Not measured." in shown(capsys, checkpoint)
    assert "| accuracy | 0.25 |" in shown(capsys, checkpoint, "--summary", str(summary))
    moved = checkpoint.rename(checkpoint.parent / "update_0030")
    write_json(summary, {"accuracy": 0.5, "update": 30})
    assert "| accuracy | 0.5 |" in shown(capsys, moved)
    write_json(summary, {"accuracy": 0.5, "epoch": None, "checkpoint": str(moved)})
    assert "| accuracy | 0.5 |" in shown(capsys, moved)


@pytest.mark.parametrize(
    ("keys", "base", "data"),
    [
        ({"model_config_path": "x.json", "generate": {"items": 9}}, "none: random", '{"items": 9}'),
        ({"load_model_path": "runs/a/epoch_02", "train_path": "b.json"}, "epoch_02 of a", "b.json"),
        ({"model_id": "owner/base", "dataset_name": "gsm8k"}, "owner/base", "gsm8k"),
        ({"model_id": str(SHIPPED), "train_path": "b.json"}, "prosqa\n", "b.json"),
    ],
)
def test_base_and_data_are_the_runs_own(checkpoint, capsys, keys, base, data):
    settings(checkpoint, **keys)
    said = shown(capsys, checkpoint)
    assert f"Base model: {base}" in said and data in said.split("Data: ")[1].splitlines()[0]
    assert ("base_model: " in said) == (keys.get("model_id") == "owner/base")


def test_what_no_file_tells_must_be_given(checkpoint, capsys):
    (checkpoint.parent / "config.yaml").unlink()
    said = refusal(capsys, str(checkpoint), "--repo", REPO)
    assert "give --base and --data" in said
    said = refusal(capsys, str(checkpoint), "--repo", REPO, "--base", "none")
    assert "give --data" in said
    said = shown(capsys, checkpoint, "--base", "owner/base", "--data", "mine", "--license", "mit")
    for part in ("base_model: owner/base", "Data: mine", "license: mit", "The weights: mit."):
        assert part in said
    with pytest.raises(SystemExit):
        shown(capsys, checkpoint, "--license", "No Such")
    assert "no identifier" in capsys.readouterr().err


def test_what_cannot_be_published_is_refused(hub, checkpoint, tmp_path, capsys, monkeypatch):
    ask = [str(checkpoint), "--repo", REPO]
    assert "valid hub name" in refusal(capsys, str(checkpoint), "--repo", "a/b/c")
    assert "config.json" in refusal(capsys, str(tmp_path), "--repo", REPO)
    assert "none.json" in refusal(capsys, *ask, "--summary", str(tmp_path / "none.json"))
    hub.refuses = True
    assert "may not write" in refusal(capsys, *ask)
    hub.refuses = False
    main("mlx_coconut", ask)
    capsys.readouterr()
    assert "public" in refusal(capsys, *ask, "--private")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "does not accept the token" in refusal(capsys, *ask)
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN" in refusal(capsys, *ask)


def test_a_cut_connection_is_one_line(hub, checkpoint, capsys, monkeypatch):
    def cut(handler, *_):
        handler.close_connection = True

    monkeypatch.setattr("hub_standin.Handler._commit", cut)
    assert "upload failed" in refusal(capsys, str(checkpoint), "--repo", REPO)
