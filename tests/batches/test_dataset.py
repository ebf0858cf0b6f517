"""Data files: what is read, what is refused and how it is said, generated training data."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import examples, gpt2_encoding
from hypothesis import given
from hypothesis import strategies as st

from coconut.batches.curriculum import Sample, markers_of, training_row
from coconut.batches.dataset import SHOWN_PROBLEMS, check_lengths, read_items, tokenize
from coconut.batches.training_data import DEBUG_ITEMS, TrainingData, sentences
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.tasks import prosqa, prosqa_graph
from coconut.text.answers import OUTCOMES, classify_chain
from coconut.text.tiktoken import TiktokenTokenizer, prosqa_encoding

GOOD = {"question": "Tom is a wumpus. Is Tom a wumpus or impus?", "answer": "yes", "steps": ["a."]}
TOKENIZER = prosqa_encoding()
CASES = Path(__file__).parents[1] / "cases"
VALID = Path(__file__).parents[2] / "data/prosqa_made_valid.json"


def file_of(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "items.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_items(path)
    return str(caught.value)


GRAPH = json.loads(VALID.read_text())[0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"idx_to_symbol": None}, "idx_to_symbol must be a list of texts"),
        ({"idx_to_symbol": ["Tom", 1]}, "idx_to_symbol must be a list of texts"),
        ({"edges": [[0, 1, 2]]}, r"edges must be a list of \[parent, child\]"),
        ({"edges": [[0, 10_000]]}, r"edges must be a list of \[parent, child\]"),
        ({"root": "Tom", "target": True}, "root must be a number of idx_to_symbol.*target must be"),
        ({"root": 5}, "root must be 0 or 1"),
        ({"edges": []}, "neg_target cannot be reached from node"),
        ({"neg_target": -1}, "neg_target must be a number of idx_to_symbol"),
        ({"question": "What is Tom?"}, "question holds no statement before what it asks"),
    ],
)
def test_a_graph_that_no_chain_could_be_held_against_is_refused(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=f"(?s)item 1: {complaint}"):
        read_items(file_of(tmp_path, [GRAPH, GRAPH | changes]))


def test_only_the_swap_test_asks_for_two_names_and_a_statement(tmp_path):
    item = GRAPH | {"root": 5, "question": "What is Tom?"}
    del item["neg_target"]
    assert read_items(file_of(tmp_path, [item])) == [item]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 30) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@examples(100)
@given(changes=st.dictionaries(st.sampled_from(sorted(GRAPH)), ANY, max_size=3), gone=st.integers())
def test_what_is_read_can_be_swapped_and_judged(tmp_path_factory, changes, gone):
    item = GRAPH | changes
    if gone % 3 == 0:
        del item[sorted(item)[gone % len(item)]]
    try:
        (item,) = read_items(file_of(tmp_path_factory.getbasetemp(), [item]))
    except UserError as error:
        assert all(len(problem) < 200 for problem in error.problems)
        return
    for one in [item, *([prosqa.swap(item)] if "neg_target" in item else [])]:
        if "edges" in one:
            chain = [step.strip() for step in one["steps"]]
            assert classify_chain(one, chain, one["answer"]) in OUTCOMES


# ---- reading


def test_items_are_read_with_their_extra_keys(tmp_path: Path) -> None:
    items = [GOOD | {"root": 1}, GOOD | {"steps": []}]
    assert read_items(file_of(tmp_path, items)) == items


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[1,\n2,,]", "not JSON (Expecting value: line 2 column 3"),
        ("", "holds no items"),
        ("[" * 5_000, "not JSON ("),
        ({"items": []}, "expected a JSON list of items, or an item a line"),
        ([], "holds no items"),
        ([GOOD, 3], "item 1: expected an object, got int"),
        ([GOOD, {"answer": "x", "steps": []}], "item 1: question is missing"),
        ([GOOD | {"answer": 5}], "item 0: answer must be text, got int"),
        ([GOOD | {"answer": None}], "item 0: answer must be text, got NoneType"),
        ([GOOD | {"question": " \n"}], "item 0: question is empty"),
        ([{"question": "a", "answer": "b"}], "item 0: steps is missing (an empty list is allowed;"),
        ([GOOD | {"steps": "a b"}], "item 0: steps must be a list of texts"),
        ([GOOD | {"steps": ["a", 1]}], "item 0: steps must be a list of texts"),
        ([GOOD | {"answer": "\ud800"}], "item 0: holds a lone surrogate"),
        ('[{"question": ' + "1" * 5000 + "}]", "not JSON ("),
    ],
)
def test_broken_files_are_named_with_item_and_field(
    tmp_path: Path, content: object, complaint: str
) -> None:
    path = file_of(tmp_path, content)
    said = message(path)
    assert said.startswith(f"{path}: {complaint}") and "\n" not in said


def test_a_missing_folder_like_or_binary_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    assert message(missing) == f"{missing}: no such file; data/README.md says how to make it"
    assert message(tmp_path) == f"{tmp_path}: cannot be read: Is a directory; check the path"
    (tmp_path / "binary").write_bytes(b"\xff\x00[")
    assert message(tmp_path / "binary").endswith("not UTF-8 text (byte 0); is it the right file?")


ITEM = {"question": "Ada has 2 pens and gets 3. How many?", "steps": ["2+3=5"], "answer": "5"}
LIST = json.dumps([ITEM] * 2)
LINES = f"{json.dumps(ITEM)}\n\n{json.dumps(ITEM)}\r\n"
FORMS = {
    "list.json": LIST.encode(),
    "lines.jsonl": LINES.encode(),
    "bom.json": LIST.encode("utf-8-sig"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf32.json": LIST.encode("utf-32"),
    "unmarked.json": LIST.encode("utf-16-le"),
    "big_endian.json": codecs.BOM_UTF16_BE + LIST.encode("utf-16-be"),
    # The content says what a file is, whatever its name.
    "gz.json": gzip.compress(LINES.encode()),
    "bz2.jsonl.bz2": bz2.compress(LIST.encode()),
    "xz.json": lzma.compress(LINES.encode("utf-16")),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_read_however_it_is_packed_and_encoded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert read_items(tmp_path / name) == [ITEM, ITEM]


def test_one_line_is_one_item_and_an_item_is_named_by_its_number(tmp_path: Path) -> None:
    assert read_items(file_of(tmp_path, json.dumps(ITEM))) == [ITEM]
    path = file_of(tmp_path, json.dumps(ITEM) + '\n{"question": 1')
    assert message(path).startswith(f"{path} line 2: not JSON (")
    path = file_of(tmp_path, json.dumps(ITEM) + '\n{"question": "a", "steps": []}')
    assert message(path) == f"{path}: item 1: answer is missing"


@pytest.mark.parametrize(
    "content, is_what",
    [
        (b"PAR1\x15\x00", "is a parquet file; pip install datasets, or write it as JSON lines"),
        (b"PK\x03\x04\x14", "is a zip archive; unpack it and name the file"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed by zstd; unpack it (zstd -d)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the data;"),
        (b"<!doctype html>", "is a page or markup, not data; download the raw file"),
        (
            gzip.compress(b"[]" * 99, mtime=0)[:20],
            "cannot be unpacked (Compressed file ended before",
        ),
        (lzma.compress(b"[]" * 99)[:50], "cannot be unpacked ("),
        (bz2.compress(b"[]")[:9] + b"x" * 20, "cannot be unpacked ("),
        (gzip.compress(b"\xff\x00[", mtime=0), "not UTF-8 text (byte 0); is it the right file?"),
    ],
)
def test_what_is_not_read_is_said(tmp_path: Path, content: bytes, is_what: str) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(content)
    said = message(path)
    assert said.startswith(f"{path}: {is_what}") and "\n" not in said


def test_parquet_is_read_by_the_package_datasets(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")

    class Dataset:
        def from_parquet(path):
            if not path.endswith("train.parquet"):
                raise RuntimeError("no magic bytes\nat the end")
            return [ITEM]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=Dataset))
    assert read_items(tmp_path / "train.parquet") == [ITEM]
    (tmp_path / "broken").write_bytes(b"PAR1")
    said = message(tmp_path / "broken")
    assert said == f"{tmp_path / 'broken'}: datasets cannot read it: no magic bytes"


@pytest.mark.parametrize(
    "cot, steps",
    [
        ("<<2+3=5>> <<5*2=10>>", ["<<2+3=5>>", "<<5*2=10>>"]),
        ("<<600*30/100=180>>", ["<<600*30/100=180>>"]),
        (
            "She gets 3. That makes 2.5 or so! Right?",
            ["She gets 3.", "That makes 2.5 or so!", "Right?"],
        ),
        ("one\n\n two \n", ["one", "two"]),
        ("", []),
    ],
)
def test_a_chain_in_one_text_becomes_steps(tmp_path: Path, cot: str, steps: list[str]) -> None:
    (item,) = read_items(file_of(tmp_path, [{"question": "a", "cot": cot, "answer": "b"}]))
    assert item["steps"] == steps and item["cot"] == cot
    # Steps come before a chain that is there too.
    (item,) = read_items(file_of(tmp_path, [ITEM | {"cot": cot}]))
    assert item["steps"] == ITEM["steps"]


def test_gsm8k_as_published_is_named(tmp_path: Path) -> None:
    path = file_of(tmp_path, [{"question": "a", "answer": "2+3=<<2+3=5>>5\n#### 5"}])
    assert "python data/gsm8k.py makes items of GSM8K" in message(path)


def test_many_problems_are_counted_not_all_shown(tmp_path: Path) -> None:
    lines = message(file_of(tmp_path, [{}] * 4)).splitlines()
    assert len(lines) == 1 + SHOWN_PROBLEMS + 1
    assert lines[1] == "  item 0: question is missing"
    assert lines[-1] == f"  ... and {4 * 3 - SHOWN_PROBLEMS} more problems"


# ---- tokens


def test_parts_are_tokenised_as_published() -> None:
    (sample,) = tokenize([GOOD | {"steps": ["Tom is a wumpus.", "b"]}], TOKENIZER, "x")
    assert sample.question == TOKENIZER.encode(GOOD["question"] + "\n")
    assert sample.steps == [TOKENIZER.encode("Tom is a wumpus.\n"), TOKENIZER.encode("b\n")]
    assert sample.answer == [*TOKENIZER.encode("### yes"), TOKENIZER.eos_id]
    assert sample.idx == 0


def test_an_empty_step_is_a_bare_line_end_as_published() -> None:
    """The published conversion of GSM8K leaves one where a solution has no annotation."""
    whole = gpt2_encoding().with_latents()
    items = read_items(CASES / "09_empty_step/items.json")
    empty, other = tokenize(items, whole, "x")
    # GPT-2 has a token for two line ends, which the published code's parts never make.
    assert whole.encode("\n\n") != 2 * whole.encode("\n")
    assert empty.steps == [whole.encode("\n")] and len(other.steps) == 1
    markers = markers_of(whole)
    for stage, rest in ((0, empty.steps[0]), (1, [])):
        config = RunConfig(method="coconut")
        row = training_row(config, empty, stage, markers, np.random.default_rng(0))
        latents = [markers.start, *[markers.latent] * stage, markers.end]
        assert row.ids == [*empty.question, *latents, *rest, *empty.answer]


def test_parts_that_do_not_add_up_to_the_whole_are_named() -> None:
    # A vocabulary that joins a line's end to the b after it, as GPT-2's joins "\n\n".
    ranks = {bytes([b]): b for b in range(256)} | {b"\nb": 256}
    joining = TiktokenTokenizer("joining", r"[\s\S]+", ranks, {"<|endoftext|>": 257})
    torn = GOOD | {"steps": ["a", "b"]}
    with pytest.raises(UserError) as caught:
        tokenize([GOOD, torn, GOOD, torn], joining, "file.json")
    lines = str(caught.value).splitlines()
    assert lines[0] == "file.json: 2 problems"
    assert lines[1].startswith("  item 1: its parts, tokenised alone, are not the tokens of the")
    assert lines[2].startswith("  item 3: ")


def test_every_shipped_item_adds_up() -> None:
    items = read_items(VALID)
    assert len(tokenize(items, TOKENIZER, str(VALID))) == len(items)


def test_an_item_too_long_for_the_model_is_named() -> None:
    lengths = {0: 9, 1: 12, 2: 10}
    check_lengths(lengths, n_positions=12, where="x")
    check_lengths(lengths, n_positions=None, where="x")
    with pytest.raises(
        UserError, match=r"x: item 1: up to 12 tokens .* the model has 11 positions"
    ):
        check_lengths(lengths, n_positions=11, where="x")


# ---- training data


def data(**keys) -> TrainingData:
    keys = {"method": "coconut", "val_path": str(VALID), **keys}
    return TrainingData(RunConfig(**keys), TOKENIZER)


def texts(samples: list[Sample]) -> list[str]:
    return [TOKENIZER.decode(s.question) for s in samples]


def test_a_training_file_is_read_once_and_gives_every_epoch_the_same(tmp_path: Path) -> None:
    path = file_of(tmp_path, [GOOD, GOOD])
    training = data(train_path=str(path))
    first = training.samples(0)
    path.unlink()
    assert training.samples(5) is first and len(first) == 2


def test_a_debug_run_takes_the_first_items(tmp_path: Path) -> None:
    path = file_of(tmp_path, [GOOD | {"answer": str(i)} for i in range(DEBUG_ITEMS + 5)])
    assert len(data(train_path=str(path), debug=True).samples(0)) == DEBUG_ITEMS


def test_generated_data_are_written_on_first_use_and_then_read(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    made = data(train_path=str(path), generate={"items": 6, "seed": 1, "nodes": 12}).samples(0)
    assert len(json.loads(path.read_text())) == len(made) == 6
    before = path.read_bytes()
    again = data(train_path=str(path), generate={"items": 6, "seed": 1, "nodes": 12}).samples(0)
    assert texts(again) == texts(made) and path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["train.json"]


def test_generated_data_without_a_file_stay_the_same_in_every_epoch() -> None:
    training = data(generate={"items": 4, "nodes": 12})
    assert texts(training.samples(0)) == texts(training.samples(1))
    assert texts(training.samples(0)) == texts(data(generate={"items": 4, "nodes": 12}).samples(3))


def test_fresh_data_are_new_in_every_epoch_and_the_same_after_a_resume() -> None:
    generate = {"items": 8, "fresh": True, "nodes": 12}
    training = data(generate=generate)
    epochs = [texts(training.samples(epoch)) for epoch in range(3)]
    assert len({text for epoch in epochs for text in epoch}) == 24
    assert texts(data(generate=generate).samples(2)) == epochs[2]
    assert texts(data(generate=generate, seed=5).samples(0)) != epochs[0]


def test_an_option_of_fresh_data_may_change_with_the_epoch() -> None:
    steps = ["walk", "thoughts"]
    changing = {"fresh": True, "items": 4, "min_hops": 1, "nodes": [5, 28], "steps": steps}
    training = data(generate=changing)
    first, *later = (training.samples(epoch) for epoch in range(3))
    assert all(s.steps and not s.thoughts and s.latents == 0 for s in first)
    # The last value stays.
    assert all(s.thoughts and not s.steps for samples in later for s in samples)
    longest = max(len(s.question) for s in first)
    assert all(len(s.question) > longest for samples in later for s in samples)


def test_no_generated_item_is_one_of_the_shipped_sets() -> None:
    # Seed 3 made the shipped test set.
    made = data(generate={"items": 30, "seed": 3}).samples(0)
    shipped = {
        q
        for name in ("valid", "test")
        for q in questions(VALID.with_name(f"prosqa_made_{name}.json"))
    }
    assert not shipped & {text.strip() for text in texts(made)}


def questions(path: Path) -> list[str]:
    return [item["question"] for item in json.loads(path.read_text())]


def test_no_generated_item_is_one_of_the_validation_file(tmp_path: Path) -> None:
    options = prosqa_graph.Options(nodes=12)
    held_out = list(prosqa.generate(options, 7, 10))
    path = file_of(tmp_path, held_out)
    generate = {"items": 10, "seed": 7, "nodes": 12}
    made = data(val_path=str(path), generate=generate).samples(0)
    assert not {item["question"] for item in held_out} & {text.strip() for text in texts(made)}


def test_recall_repeats_the_statements_of_the_question(tmp_path: Path) -> None:
    assert sentences("A b. Every c is a d. Is A a d or e?") == ["A b.", "Every c is a d."]
    path = file_of(tmp_path, [GOOD])
    (sample,) = data(method="recall", train_path=str(path)).samples(0)
    assert [TOKENIZER.decode(s) for s in sample.steps] == ["Tom is a wumpus.\n"]


def test_recall_of_a_question_without_statements_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, [GOOD, GOOD | {"question": "Who?"}])
    with pytest.raises(UserError, match=r"items.json: item 1: no sentence to recall"):
        data(method="recall", train_path=str(path)).samples(0)


@pytest.mark.parametrize(
    ("thoughts", "complaint"),
    [
        (" is a", "thoughts must be a list of texts, one a latent"),
        ([" is a", ""], "thoughts must be a list of texts, one a latent"),
        ([" is a"], "thoughts must be one text for each of its latents, got 1"),
    ],
)
def test_thoughts_that_do_not_fit_their_latents_are_refused(tmp_path, thoughts, complaint) -> None:
    path = tmp_path / "data.json"
    item = {"question": "Q?", "answer": "A", "steps": [], "latents": 2, "thoughts": thoughts}
    path.write_text(json.dumps([item]))
    with pytest.raises(UserError, match=complaint):
        read_items(path)
