"""What --check prints: stages, sizes, memory, resume in words; and that it opens no framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_source import IDS, MARKED, checkpoint
from tiny import run_config, zero_model

from coconut.checkpoints.model_args import PUBLISHED_SHAPES
from coconut.commands.run import start_run
from coconut.config.keys import RunConfig
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError
from coconut.plan import memory
from coconut.plan.memory import evaluation_bytes, shape_of, training_bytes
from coconut.plan.plan import print_plan, resume_in_words
from coconut.plan.rows import LONGEST, SPREAD
from coconut.world import World

ROOT = Path(__file__).parents[2]
TINY = ROOT / "args" / "models" / "tiny_gpt2.json"
ITEMS = [
    {"question": "Tom is a wumpus. " * n + "Who?", "answer": "b", "steps": ["c", "d e"][:n]}
    for n in (0, 1, 2)
]


@pytest.fixture
def keys(tmp_path: Path) -> dict:
    (tmp_path / "data.json").write_text(json.dumps(ITEMS))
    return {
        "method": "coconut",
        "model_config_path": str(TINY),
        "tokenizer": "prosqa",
        "train_path": str(tmp_path / "data.json"),
        "val_path": str(tmp_path / "data.json"),
        "save_path": str(tmp_path / "runs"),
        "c_thought": 2,
        "max_latent_stage": 2,
        "epochs_per_stage": 2,
        "num_epochs": 9,
        "batch_size_training": 2,
        "gradient_accumulation_steps": 1,
    }


def printed(keys: dict, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_plan(check_config(keys), "mlx_coconut")
    return capsys.readouterr().out.splitlines()


def table(lines: list[str], title: str) -> list[list[str]]:
    """Cells of the rows under a title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 3
    rows = []
    for line in lines[start:]:
        if not line.startswith("  ") or line.startswith("  ("):
            break
        rows.append(line.split())
    return rows


# ---- stages


def test_epochs_of_a_stage_stand_in_one_row(keys: dict, capsys) -> None:
    rows = table(printed(keys, capsys), "training on")
    # epochs, stage, steps dropped, latents, examples, updates
    assert [row[:6] for row in rows] == [
        ["1-2", "0", "0", "0", "3", "4"],
        ["3-4", "1", "0-1", "2", "3", "4"],
        ["5-6", "2", "0-2", "4", "3", "4"],
        ["7-9", "3-4", "0-2", "4", "3", "6"],
    ]


def test_latents_follow_the_items_without_padding(keys: dict, capsys) -> None:
    rows = table(printed(keys | {"pad_latent_to_max": False}, capsys), "training on")
    assert [row[3] for row in rows] == ["0", "0-2", "0-4", "0-4"]


def test_skipped_epochs_are_left_out(keys: dict, capsys) -> None:
    lines = printed(keys | {"resume": 3}, capsys)
    assert [row[:2] for row in table(lines, "training on")] == [
        ["4", "1"],
        ["5-6", "2"],
        ["7-9", "3-4"],
    ]
    assert (
        "resume 3: starts from random weights, seed 0 at epoch 4, stage 1; the first 3 epochs of"
        " the schedule are skipped, no file of theirs is read"
    ) in lines


def test_lengths_are_those_of_the_rows(keys: dict, capsys) -> None:
    n_tokens = [
        len(MARKED.encode(i["question"] + "\n"))
        + sum(len(MARKED.encode(step + "\n")) for step in i["steps"])
        + len(MARKED.encode("### " + i["answer"]))
        + 1
        for i in ITEMS
    ]
    first = table(printed(keys | {"method": "cot"}, capsys), "training on")[0]
    mean = round(sum(n_tokens) / 3)
    assert first[6:] == [str(min(n_tokens)), str(mean), str(max(n_tokens))]


def test_icot_shows_what_each_epoch_removes(keys: dict, capsys) -> None:
    more = {"method": "icot", "icot_tokens_per_epoch": 1, "icot_smoothing": 0, "num_epochs": 3}
    lines = printed(keys | more, capsys)
    rows = table(lines, "training on")
    assert [(row[0], row[2]) for row in rows] == [("1", "0"), ("2", "0-1"), ("3", "0-2")]
    assert any("tokens removed" in line for line in lines)


@pytest.mark.parametrize("more", [{"method": "recall"}, {"stage_mixing": "batch"}, {"debug": True}])
def test_every_kind_of_run_has_a_plan(keys: dict, capsys, more: dict) -> None:
    if more.get("method") == "recall":
        items = [item for item in ITEMS if item["steps"]]
        Path(keys["train_path"]).write_text(json.dumps(items))
    assert table(printed(keys | more, capsys), "training on")


def test_data_still_to_be_made_are_sampled_and_not_written(keys: dict, capsys) -> None:
    path = Path(keys["save_path"]).parent / "prosqa_made_train.json"
    generate = {"items": SPREAD + LONGEST + 800, "nodes": 12}
    lines = printed(keys | {"train_path": str(path), "generate": generate}, capsys)
    assert f"training on {path} (made on first use):" in lines
    assert "  (from a sample of 1,000 of 2,000 items)" in lines
    assert table(lines, "training on")[0][4:6] == ["2000", "2000"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["data.json"]


def test_of_a_large_file_a_sample_with_the_longest_items_is_tokenised(keys: dict, capsys) -> None:
    long = {"question": "x" * 100, "answer": "b", "steps": []}
    items = [ITEMS[0]] * 1500 + [long] + [ITEMS[0]] * 1500
    Path(keys["train_path"]).write_text(json.dumps(items))
    keys["val_path"] = str(ROOT / "data" / "prosqa_made_valid.json")
    lines = printed(keys | {"method": "cot"}, capsys)
    row = table(lines, "training on")[0]
    assert row[4] == "3001" and row[-1] == str(100 + 1 + len(MARKED.encode("### b")) + 1)
    assert any("of 3,001 items)" in line for line in lines)


def test_a_broken_item_of_a_sample_keeps_its_number(keys: dict) -> None:
    items = [ITEMS[0]] * 3000
    items[1234] = {"question": "x" * 300, "answer": "b", "steps": []}
    Path(keys["train_path"]).write_text(json.dumps(items))
    keys["val_path"] = str(ROOT / "data" / "prosqa_made_valid.json")
    with pytest.raises(
        UserError, match=r"data.json: item 1234: up to 3\d\d tokens .* 256 positions"
    ):
        print_plan(check_config(keys), "mlx_coconut")


# ---- the model


@pytest.mark.parametrize(
    "name, n_params",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes_are_counted_exactly(name: str, n_params: int) -> None:
    assert shape_of(PUBLISHED_SHAPES[name], 50257, name).n_params == n_params


def test_a_qwen_is_counted_exactly() -> None:
    # Qwen2.5-0.5B: 494,032,768 parameters, tied.
    model = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    assert shape_of(model, 151_936, "x").n_params == 494_032_768
    untied = shape_of(model | {"tie_word_embeddings": False}, 151_936, "x")
    assert untied.n_params == 494_032_768 + 151_936 * 896


@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen2-tiny", "qwen2-tiny-untied"])
def test_the_count_is_that_of_the_weights(name: str) -> None:
    from coconut.checkpoints.checkpoint import describe

    found = describe(ROOT / "tests" / "golden" / "models" / name)
    tensors = {
        n: t for n, t in found["tensors"].items() if n != "lm_head.weight" or "untied" in name
    }
    total = 0
    for tensor in tensors.values():
        size = 1
        for n in tensor.shape:
            size *= n
        total += size
    assert shape_of(found["config"], found["config"]["vocab_size"], name).n_params == total


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported"),
        ({"n_layer": None}, "n_layer: expected a whole number above 0, got None"),
        ({"n_embd": "64"}, "n_embd: expected a whole number above 0, got '64'"),
        ({"n_inner": 0}, "n_inner: expected a whole number above 0, got 0"),
        ({"n_head": 7}, "width 768 cannot be divided among 7 heads"),
    ],
)
def test_a_config_that_is_no_model_is_named(changes: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=f"x.json: {complaint}"):
        shape_of(PUBLISHED_SHAPES["gpt2"] | changes, 50257, "x.json")


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without network and without anything in the hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def on_hub(keys: dict, model_id: str, **more) -> dict:
    rest = {k: v for k, v in keys.items() if k not in ("model_config_path", "tokenizer")}
    return {**rest, "model_id": model_id, **more}


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("has_vocabulary", [True, False])
def test_a_published_model_needs_no_download(
    keys: dict, capsys, empty_hub, monkeypatch, name: str, has_vocabulary: bool
) -> None:
    from coconut.plan import unbuilt

    def load(which: str):
        assert which == "gpt2"
        if not has_vocabulary:
            raise UserError("gpt2", "the GPT-2 vocabulary cannot be fetched")
        return plan_tokenizer

    plan_tokenizer = unbuilt.load_tokenizer("prosqa")
    monkeypatch.setattr(unbuilt, "load_tokenizer", load)
    lines = printed(on_hub(keys, name), capsys)
    assert "124,442,112 params" in lines[0] or has_vocabulary
    assert lines[1].startswith(f"{name}: not downloaded yet, and the hub cannot be reached; publ")
    rows = table(lines, "training on")
    assert [row[3] for row in rows] == ["0", "2", "4", "4"]
    assert (rows[0][-1] == "?") is not has_vocabulary
    assert any("estimated" in line for line in lines) is has_vocabulary


def test_an_unknown_model_is_planned_without_its_size(keys: dict, capsys, empty_hub) -> None:
    lines = printed(on_hub(keys, "someone/model"), capsys)
    assert "params" not in lines[0]
    assert lines[1] == (
        "someone/model: not downloaded yet, and the hub cannot be reached; its size is unknown"
        " until it is, and so are its tokens"
    )
    rows = table(lines, "training on")
    assert [row[:4] for row in rows][1] == ["3-4", "1", "0-1", "2"]
    assert rows[0][-1] == "?"
    assert not any("estimated" in line for line in lines)


@pytest.mark.parametrize("name", ["a/b/c", "no such directory", "../up"])
def test_a_name_the_hub_cannot_have_is_refused(keys: dict, empty_hub, name: str) -> None:
    with pytest.raises(UserError, match="neither a directory nor a valid hub name"):
        print_plan(check_config(on_hub(keys, name)), "mlx_coconut")


# ---- evaluation and resuming


def trained(tmp_path: Path, **fields) -> Path:
    directory = checkpoint(
        tmp_path / "trained", len(MARKED), method="coconut", latent_ids=IDS, **fields
    )
    return zero_model(directory, **json.loads(TINY.read_text()) | {"vocab_size": len(MARKED)})


@pytest.mark.parametrize(
    "more, words, latents",
    [
        ({}, "at stage 2 (the checkpoint's own)", "4"),
        ({"resume": 2}, "at stage 1 (resume: 2 // 2 epochs per stage)", "2"),
        ({"stage": 0}, "at stage 0 (key stage)", "0"),
        ({"n_latents": 3}, "at stage 2 (the checkpoint's own)", "3"),
    ],
)
def test_an_evaluation_says_its_stage_latents_and_why(
    keys: dict, tmp_path: Path, capsys, more: dict, words: str, latents: str
) -> None:
    directory = trained(tmp_path, stage=2)
    del keys["model_config_path"], keys["tokenizer"]
    lines = printed(keys | {"only_eval": True, "load_model_path": str(directory)} | more, capsys)
    assert f"evaluates {directory} once, {words}" in lines
    assert [row[1] for row in table(lines, "evaluation on")] == [latents]
    assert not any(line.startswith("training") for line in lines)


def test_a_damaged_checkpoint_is_found(keys: dict, tmp_path: Path) -> None:
    directory = trained(tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        config = check_config(keys | {"only_eval": True, "load_model_path": str(directory)})
        print_plan(config, "mlx_coconut")


def run_with(tmp_path: Path, epoch: int, update: int = 0) -> Path:
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"epoch": epoch, "update_in_epoch": update})
    )
    return tmp_path


def test_what_a_run_starts_from_is_said_in_words(tmp_path: Path) -> None:
    run = RunConfig(method="coconut", epochs_per_stage=2, num_epochs=5, model_id="gpt2", resume=2)
    assert resume_in_words(run, None).startswith(
        "resume 2: starts from the weights of gpt2 at epoch 3, stage 1; the first 2 epochs"
    )
    assert resume_in_words(run, run_with(tmp_path, 3, 7)) == (
        f"continues {tmp_path} with 3 of 5 epochs and 7 updates of the next done: at epoch 4,"
        " stage 1; keys resume and load_model_path are not read"
    )
    assert resume_in_words(run, run_with(tmp_path, 5)).startswith(
        f"{tmp_path} has all 5 epochs behind it: nothing is left to train"
    )
    run = RunConfig(method="cot", model_config_path="x", seed=3)
    assert resume_in_words(run, None) == "starts from random weights, seed 3 at epoch 1, stage 0"


def test_a_question_that_leaves_too_little_room_for_its_answer_is_noted(keys: dict, capsys) -> None:
    lines = printed(keys | {"max_new_tokens": 10_000}, capsys)
    (note,) = [line for line in lines if line.startswith("note: the longest question leaves")]
    assert "of 256 positions, fewer than the 10000 new tokens allowed: its answer is cut" in note


# ---- memory


def on_a_mac(monkeypatch, giga_bytes: float) -> None:
    """As if this machine were one, with so much memory."""
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.platform, "machine", lambda: "arm64")
    sizes = {"SC_PHYS_PAGES": int(giga_bytes * 2**30 / 4096), "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", sizes.__getitem__)


def test_metal_lets_a_program_use_two_thirds_of_a_small_mac(monkeypatch) -> None:
    assert memory.gpu_memory() is None
    on_a_mac(monkeypatch, 16)
    assert memory.gpu_memory() == pytest.approx(16 * 2**30 * 2 / 3, rel=1e-3)
    on_a_mac(monkeypatch, 64)
    assert memory.gpu_memory() == pytest.approx(48 * 2**30, rel=1e-3)


def test_a_batch_that_a_mac_has_no_room_for_is_said_with_the_key(
    tmp_path, monkeypatch, capsys
) -> None:
    config = run_config(tmp_path, batch_size_training=8)
    assert print_plan(config, "mlx_coconut") == []
    on_a_mac(monkeypatch, 0.001)
    training, evaluation = print_plan(config, "mlx_coconut")
    assert "may use about 0.0 GB" in training and "change batch_size_training" in training
    assert "change eval_batch_size" in evaluation
    assert training in capsys.readouterr().out

    # A run that starts says the same before anything is loaded.
    def fails(*args, **keys):
        assert "change batch_size_training" in capsys.readouterr().err
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_run(config, fails, "mlx_coconut", World())


SMALL = shape_of(PUBLISHED_SHAPES["gpt2"], 50260, "gpt2")


PLAIN, CHECKPOINTED = RunConfig(), RunConfig(gradient_checkpointing=True)


def test_the_estimate_is_near_what_gpt2_small_was_measured_to_take() -> None:
    # GB of the second update in MLX on x86-64.
    for rows, labels, behind, measured in ((4, 60, 67, 3.82), (4, 240, 247, 5.09)):
        estimate = training_bytes(SMALL, rows, 480, rows * labels, PLAIN, n_behind=behind)
        assert estimate / 1e9 == pytest.approx(measured, rel=0.1)
    # So few tokens that the update itself is the peak.
    estimate = training_bytes(SMALL, 2, 448, 120, CHECKPOINTED, n_behind=67)
    assert estimate / 1e9 == pytest.approx(3.11, rel=0.05)
    assert evaluation_bytes(SMALL, 8, 390, 16) / 1e9 == pytest.approx(1.29, rel=0.15)


def test_the_estimate_grows_with_everything_and_shrinks_with_checkpointing() -> None:
    base = training_bytes(SMALL, 8, 480, 100, PLAIN)
    for more in ((16, 480, 100), (8, 960, 100), (8, 480, 900)):
        assert training_bytes(SMALL, *more, PLAIN) > base
    assert training_bytes(SMALL, 8, 480, 100, PLAIN, n_behind=60) > base
    assert training_bytes(SMALL, 8, 480, 100, CHECKPOINTED) < base
    large = training_bytes(SMALL, 32, 480, 100, PLAIN)
    assert training_bytes(SMALL, 32, 480, 100, RunConfig(bf16=True)) < large
    assert training_bytes(SMALL, 0, 0, 0, PLAIN) == 25 * SMALL.n_params
    less = evaluation_bytes(SMALL, 8, 400, 10)
    assert evaluation_bytes(SMALL, 16, 400, 10) > less < evaluation_bytes(SMALL, 8, 400, 100)
    assert evaluation_bytes(SMALL, 0, 0, 0) == 4 * SMALL.n_params


# ---- the command


def test_check_opens_no_framework_and_writes_nothing(keys: dict, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code = (
        "import runpy, sys; sys.argv[1:] = [{!r}, '--check'];"
        "runpy.run_module('mlx_coconut.run', run_name='__main__');"
        "print(sorted({{'mlx', 'mlx.core', 'torch', 'transformers'}} & set(sys.modules)))"
    ).format(str(tmp_path / "run.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "" and done.returncode == 0
    *plan, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert (
        plan[-1] == "checked: no model was built, no weights were downloaded, nothing was written"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


MAC_KEYS = {"name", "batch_size_training", "gradient_accumulation_steps"}
MAC_KEYS |= {"gradient_checkpointing", "eval_batch_size"}
LONGEST_ROW, LABELS, LONGEST_QUESTION = 704, 190, 514
"""Of the generated ProsQA items in GPT-2's tokens, as --check prints them; labels rounded up."""


@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_run_for_a_mac_makes_the_published_updates_and_fits(monkeypatch, size: int) -> None:
    published = load_config(ROOT / "args/prosqa_coconut.yaml")
    ours = load_config(ROOT / f"args/prosqa_coconut_{size}gb.yaml")
    changed = {name for name, value in vars(published).items() if getattr(ours, name) != value}
    assert changed - {"where"} <= MAC_KEYS
    rows = [c.batch_size_training * c.gradient_accumulation_steps for c in (published, ours)]
    assert rows == [128, 128]
    on_a_mac(monkeypatch, size)
    n = ours.batch_size_training
    training = training_bytes(SMALL, n, LONGEST_ROW, n * LABELS, ours, n_behind=LABELS)
    asking = evaluation_bytes(
        SMALL, ours.eval_batch_size, LONGEST_QUESTION, ours.new_tokens, ours.bf16
    )
    assert max(training, asking) < memory.gpu_memory()
    whole = training_bytes(SMALL, 32, LONGEST_ROW, 32 * LABELS, published, n_behind=LABELS)
    assert whole > memory.gpu_memory()
