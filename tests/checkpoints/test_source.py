"""Where a model and its tokenizer come from, and that trained rows are left as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import zero_model

from coconut.checkpoints.source import open_source
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.run.saving import newest_checkpoint, progress_of
from coconut.text.tiktoken import prosqa_encoding

MARKED = prosqa_encoding().with_latents()
IDS = [MARKED.start_id, MARKED.end_id, MARKED.latent_id]


def checkpoint(directory: Path, rows: int, **coconut) -> Path:
    """The least that is a checkpoint: a tiny model, a tokenizer, coconut.json."""
    zero_model(directory, vocab_size=rows)
    (MARKED if coconut.get("latent_ids") else prosqa_encoding()).save(directory)
    if coconut:
        (directory / "coconut.json").write_text(json.dumps({"format_version": 1, **coconut}))
    return directory


def config(directory: Path, **keys) -> RunConfig:
    return RunConfig(**{"method": "coconut", "load_model_path": str(directory), **keys})


def test_a_plain_checkpoint_is_given_the_three_markers(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path / "plain", MARKED.vocab_size)
    opened = open_source(config(plain))
    assert list(opened.source.new_tokens) == IDS
    assert opened.source.vocab_size == len(MARKED)
    assert not open_source(config(plain, method="cot")).source.new_tokens


@pytest.mark.parametrize("tokenizer", [None, "prosqa"])
def test_trained_marker_rows_are_never_set_anew(tmp_path: Path, tokenizer: str | None) -> None:
    # Also where the configuration names the tokenizer the run was once started with.
    trained = checkpoint(tmp_path / "trained", len(MARKED), method="coconut", latent_ids=IDS)
    opened = open_source(config(trained, tokenizer=tokenizer))
    assert not opened.source.new_tokens
    run = RunConfig(method="coconut", model_config_path="x.json", tokenizer=tokenizer)
    assert not open_source(run, resume_from=trained).source.new_tokens


def test_a_resumed_run_keeps_the_tokenizer_of_its_checkpoint(tmp_path: Path) -> None:
    trained = checkpoint(tmp_path / "trained", len(MARKED), method="coconut", latent_ids=IDS)
    run = RunConfig(method="coconut", model_config_path="x.json", tokenizer="no such one")
    assert open_source(run, resume_from=trained).tokenizer.start_id == MARKED.start_id


def test_latent_ids_that_are_not_the_tokenizers_are_refused(tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "x", len(MARKED), method="coconut", latent_ids=[5, 6, 7])
    with pytest.raises(UserError, match=r"trained with the latent tokens \[5, 6, 7\], but its"):
        open_source(config(other))


def test_a_latent_checkpoint_is_refused_by_a_plain_method(tmp_path: Path) -> None:
    trained = checkpoint(tmp_path / "trained", len(MARKED), method="pause", latent_ids=IDS)
    with pytest.raises(UserError, match=r"trained with latents \(pause\), which method cot cannot"):
        open_source(config(trained, method="cot"))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small", 300)
    with pytest.raises(UserError, match=r"tokenizer has \d+ tokens but its model only 300 rows"):
        open_source(config(small))


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"method": "magic"}, "method: expected one of coconut, cot"),
        ({"latent_ids": [1, 2]}, "latent_ids: expected three ids"),
        ({"latent_ids": "abc"}, "latent_ids: expected three ids"),
        ({"stage": "last"}, "stage: expected a whole number"),
        ({"c_thought": True}, "c_thought: expected a whole number"),
        ({"pad_latent_to_max": 1}, "pad_latent_to_max: expected true or false"),
        ({"labelled_thoughts": "yes"}, "labelled_thoughts: expected true or false"),
        ({"latent_growth": "two"}, "latent_growth: expected one of stage, one"),
    ],
)
def test_wrong_fields_of_coconut_json_are_named(
    tmp_path: Path, fields: dict, complaint: str
) -> None:
    directory = checkpoint(tmp_path / "x", len(MARKED), **fields)
    with pytest.raises(UserError, match=f"coconut.json: {complaint}"):
        open_source(config(directory))


@pytest.mark.parametrize("value", ["600", None, 1.5, True])
def test_a_vocabulary_size_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    directory = checkpoint(tmp_path / "x", len(MARKED))
    model = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(model | {"vocab_size": value}))
    with pytest.raises(UserError, match=r"config.json: vocab_size: expected a whole number"):
        open_source(config(directory))


def test_a_weight_file_in_place_of_a_directory_is_explained(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_3").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a file; convert it first: python convert/torch_to_mlx"):
        open_source(config(tmp_path / "checkpoint_3"))


def test_the_newest_checkpoint_is_the_one_that_got_furthest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for name, epoch, update in (("epoch_01", 1, 0), ("epoch_02", 2, 0), ("last", 2, 5)):
        (tmp_path / name).mkdir()
        state = {"epoch": epoch, "update_in_epoch": update}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path) == tmp_path / "last"
    (tmp_path / "last" / "trainer_state.json").write_text('{"epoch": 1, "update_in_epoch": 9}')
    assert newest_checkpoint(tmp_path) == tmp_path / "epoch_02"
    (tmp_path / "last" / "trainer_state.json").write_text('{"epoch": 1}')
    with pytest.raises(UserError, match=r"trainer_state.json: expected epoch and update_in_epoch"):
        progress_of(tmp_path / "last")
