"""Publishing a checkpoint: the card, what is sent, and what is said if it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_standin import TOKEN, Hub, serving

from coconut.ask import checkpoint_config
from coconut.checkpoint import describe
from coconut.hub import fetch
from coconut.publish import main
from coconut.source import open_source

SHIPPED = Path(__file__).parents[1] / "data/checkpoints/prosqa"
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
    summary = {"accuracy": 0.25, "swapped_accuracy": 0.5, "both_accuracy": 0.125}
    (directory.parent / "summary.json").write_text(json.dumps(summary))
    return directory


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main("mlx_coconut", argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_dry_run_shows_card_and_files_and_sends_nothing(hub, checkpoint, capsys):
    main("mlx_coconut", [str(checkpoint), "--repo", REPO, "--dry-run"])
    said = capsys.readouterr().out
    for part in ("| both_accuracy | 0.125 |", "Feedback rule: last", "Stage: 7", "cuda_coconut"):
        assert part in said
    assert "model.safetensors" in said and "optimizer" not in said and "trainer_state" not in said
    assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "second"])
def test_what_was_published_can_be_fetched_and_opened(hub, checkpoint, revision):
    branch = ["--revision", revision] if revision else []
    main("mlx_coconut", [str(checkpoint), "--repo", REPO, "--private", *branch])
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


def test_results_nobody_measured_are_said_to_be_so(checkpoint, capsys):
    (checkpoint.parent / "summary.json").unlink()
    main("mlx_coconut", [str(checkpoint), "--repo", REPO, "--dry-run"])
    assert "Not measured." in capsys.readouterr().out


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
