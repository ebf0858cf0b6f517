"""GSM8K, ProntoQA and ARC: from published files to our items."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.errors import UserError
from coconut.tasks import arc
from data import gsm8k, prontoqa

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "data"


def shared(name):
    directory = os.environ.get("COCONUT_SHARED_DATA")
    if not directory:
        pytest.skip("COCONUT_SHARED_DATA is not set: no whole public files to compare with")
    return Path(directory) / name


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


# --- GSM8K ---------------------------------------------------------------------------------------


def test_text_lines_equal_the_published_conversion_byte_for_byte(tmp_path):
    out = tmp_path / "test.txt"
    for source in ("gsm8k_test.jsonl", "gsm8k_icot_test.txt"):
        assert run("data/gsm8k.py", HERE / source, "--format", "text", "--out", out).stderr == ""
        assert out.read_bytes() == (HERE / "gsm8k_icot_test.txt").read_bytes()


def test_whole_text_files_equal_the_published_ones(tmp_path):
    expected = {
        "test": "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8",
        "train": "d76d7abde138e852d427acac041ae06915ab2b96e169e9eba82229cf85beb943",
    }
    for name, digest in expected.items():
        out = tmp_path / f"{name}.txt"
        run("data/gsm8k.py", shared(f"gsm8k/{name}.jsonl"), "--format", "text", "--out", out)
        assert sha256(out.read_bytes()).hexdigest() == digest


def test_validation_items_leave_the_whole_training_set():
    train = gsm8k.read(shared("gsm8k/train.jsonl"))
    valid = gsm8k.read(shared("gsm8k/icot_valid.txt"))
    assert len(train) == 7_473 and len(valid) == 500
    assert len(gsm8k.without(train, valid)) == 6_973
    assert all(item in train for item in valid[:20])


def test_solution_becomes_steps_and_answer():
    solution = "6 a day\nis 6*7 = <<6*7=42>>42, .5 of it <<42*.5=21.00>>21\n#### 1,021"
    assert gsm8k.from_solution("How many?", solution, "x") == {
        "question": "How many?",
        "answer": "1,021",
        "steps": ["<<6*7=42>>", "<<42*.5=21.00>>"],
    }


def test_jsonl_and_text_give_the_same_items():
    from_jsonl = gsm8k.read(HERE / "gsm8k_test.jsonl")
    assert from_jsonl == gsm8k.read(HERE / "gsm8k_icot_test.txt")
    assert [len(item["steps"]) for item in from_jsonl].count(0) == 1


def test_a_question_with_a_unicode_line_separator_stays_one_item(tmp_path):
    items = gsm8k.read(HERE / "gsm8k_train.jsonl")
    assert len(items) == 6 and "\u2028" in items[-1]["question"]
    text = tmp_path / "train.txt"
    run("data/gsm8k.py", HERE / "gsm8k_train.jsonl", "--format", "text", "--out", text)
    assert gsm8k.read(text) == items


def test_validation_items_are_left_out_by_exact_question(tmp_path):
    out = tmp_path / "train.json"
    done = run(
        "data/gsm8k.py",
        HERE / "gsm8k_train.jsonl",
        "--exclude",
        HERE / "gsm8k_icot_valid.txt",
        "--out",
        out,
    )
    assert done.stdout == f"wrote 5 items | {out} | 1 left out\n"
    held_out = gsm8k.read(HERE / "gsm8k_icot_valid.txt")[0]["question"]
    questions = [item["question"] for item in json.loads(out.read_text())]
    assert len(questions) == 5 and held_out not in questions


def test_no_annotation_means_no_step_unless_the_published_form_is_asked_for(tmp_path):
    out = tmp_path / "items.json"
    source = HERE / "gsm8k_icot_test.txt"
    run("data/gsm8k.py", source, "--out", out)
    assert [i["steps"] for i in json.loads(out.read_text()) if len(i["steps"]) < 1] == [[]]
    run("data/gsm8k.py", source, "--out", out, "--empty-step")
    published = [line.split("||")[1].split("##")[0].strip().split(" ") for line in lines(source)]
    assert [item["steps"] for item in json.loads(out.read_text())] == published


def lines(path):
    return path.read_bytes().decode().removesuffix("\n").split("\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question"', "line 2: not JSON"),
        ("a.jsonl", '\n{"question": "q"}', "line 2: field 'answer' is missing"),
        ("a.jsonl", '{"question": " ", "answer": "#### 1"}', "line 1: field 'question' is empty"),
        ("a.jsonl", '{"question": "q", "answer": "1"}', "line 1: field 'answer' must end in"),
        ("a.jsonl", '{"question": "q", "answer": "#### "}', "line 1: field 'answer' must end in"),
        ("a.jsonl", "[1]", "item 0: expected an object, got int"),
        ("a.txt", "q||a #### 1\nq| #### 1", "line 2: expected 'question||steps #### answer'"),
        ("a.txt", "q||a 1", "line 1: expected 'question||steps #### answer'"),
        ("a.txt", "q||a ####", "line 1: expected 'question||steps #### answer'"),
        ("a.txt", "\n\n", "holds no items"),
    ],
)
def test_broken_gsm8k_item_names_file_and_line(tmp_path, name, content, message):
    path, out = tmp_path / name, tmp_path / "out.json"
    path.write_text(content)
    done = run("data/gsm8k.py", path, "--out", out)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith(str(path)) and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("question", ["a||b", "a\nb"])
def test_an_item_that_no_text_line_can_hold_is_refused(tmp_path, question):
    source, out = tmp_path / "a.jsonl", tmp_path / "a.txt"
    source.write_text(json.dumps({"question": question, "answer": "<<1=1>> #### 1"}))
    done = run("data/gsm8k.py", source, "--format", "text", "--out", out)
    assert done.returncode == 2 and "cannot be a text line" in done.stderr
    assert not out.exists()


word = st.text(st.characters(codec="utf-8", exclude_characters="#|<> \n\r"), min_size=1)


@settings(deadline=None)
@given(st.lists(word, min_size=1), st.lists(word), word)
def test_a_text_line_reads_back_as_the_item_it_was(words, steps, answer):
    question = " ".join(words)
    if not question.strip() or not answer.strip():
        return
    item = {
        "question": question,
        "answer": answer.strip(),
        "steps": [f"<<{step}>>" for step in steps],
    }
    assert gsm8k.from_line(gsm8k.to_line(item, "x"), "x") == item


# --- ProntoQA ------------------------------------------------------------------------------------


def pronto(number):
    return {
        "test_example": {
            "question": f"Every wumpus is a yumpus. Max is a wumpus. No {number}.",
            "query": "True or false: Max is a yumpus.",
            "chain_of_thought": ["Max is a wumpus.", "Every wumpus is a yumpus.", "Max is one."],
            "answer": "True",
        }
    }


def pronto_file(path, n, **changes):
    raw = {f"example{i}": pronto(i) for i in range(1, n + 1)}
    path.write_text(json.dumps({**raw, **changes}))
    return path


def test_prontoqa_sentences_are_joined_in_pairs_and_the_query_follows_the_question():
    assert prontoqa.convert({"example1": pronto(1)}, "x") == [
        {
            "question": "Every wumpus is a yumpus. Max is a wumpus. No 1. "
            "True or false: Max is a yumpus.",
            "answer": "True",
            "steps": ["Max is a wumpus. Every wumpus is a yumpus.", "Max is one."],
        }
    ]


def test_prontoqa_is_split_by_number_not_by_place_in_the_file(tmp_path):
    source = tmp_path / "raw.json"
    raw = {f"example{i}": pronto(i) for i in (3, 1, 10, 2, 4, 5, 6, 7, 8, 9)}
    source.write_text(json.dumps(raw))
    done = run("data/prontoqa.py", source, "--out-dir", tmp_path / "out", "--split", "6/1/2")
    assert done.returncode == 0 and "not used: the last 1 items" in done.stdout
    numbers = {
        part: [
            int(item["question"].split("No ")[1].split(".")[0])
            for item in json.loads((tmp_path / "out" / f"prontoqa_{part}.json").read_text())
        ]
        for part in ("train", "valid", "test")
    }
    assert numbers == {"train": [1, 2, 3, 4, 5, 6], "valid": [7], "test": [8, 9]}


def test_prontoqa_split_is_the_official_one_by_default():
    assert prontoqa.SPLIT == {"train": 9_000, "valid": 200, "test": 800}


def test_whole_prontoqa_sample_gives_six_steps_an_item():
    path = shared("prontoqa/5hop_0shot_random.json")
    items = prontoqa.convert(json.loads(path.read_text()), str(path))
    assert len(items) == 300
    for item in items:
        assert len(item["steps"]) == 6
        assert [step.count(".") for step in item["steps"]] == [2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"example2": {}}, " example2: field 'test_example' is missing"),
        ({"example2": {"test_example": {**pronto(2)["test_example"], "answer": "Yes"}}}, "True or"),
        ({"example2": {"test_example": {**pronto(2)["test_example"], "query": 1}}}, "a string"),
        (
            {"example2": {"test_example": {**pronto(2)["test_example"], "chain_of_thought": [""]}}},
            " example2: field 'chain_of_thought' must hold sentences",
        ),
        ({"extra": {}}, "example4 is missing"),
    ],
)
def test_broken_prontoqa_item_names_file_and_example(tmp_path, changes, message):
    source = pronto_file(tmp_path / "raw.json", 3, **changes)
    done = run("data/prontoqa.py", source, "--out-dir", tmp_path / "out", "--split", "1/1/1")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith(str(source)) and message in done.stderr


@pytest.mark.parametrize("split", ["2/1/1", "0/0/0", "-1/1/1"])
def test_prontoqa_split_that_does_not_fit_is_refused(tmp_path, split):
    source = pronto_file(tmp_path / "raw.json", 3)
    done = run("data/prontoqa.py", source, "--out-dir", tmp_path / "out", f"--split={split}")
    assert done.returncode == 2 and "--split" in done.stderr
    assert not (tmp_path / "out").exists()


# --- ARC -----------------------------------------------------------------------------------------

TEXTS = ["ice", "rain", "a drought", "a storm"]
LAYOUTS = {
    "letters, choices as objects": (
        {
            "id": "made-up-1",
            "question": {
                "stem": "What does a dry year bring?",
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(TEXTS, "ABCD", strict=True)
                ],
            },
            "answerKey": "C",
        },
        "C",
    ),
    "numbers, choices as lists": (
        {
            "id": "made-up-2",
            "question": "What does a dry year bring?",
            "choices": {"text": TEXTS, "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
        "3",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_arc_layouts_give_the_same_item_with_its_own_label(tmp_path, layout):
    raw, label = LAYOUTS[layout]
    source, out = tmp_path / "arc.jsonl", tmp_path / "arc.json"
    source.write_text(json.dumps(raw) + "\n")
    assert run("data/arc.py", source, "--out", out).returncode == 0
    assert json.loads(out.read_text()) == [
        {
            "question": "What does a dry year bring?",
            "options": TEXTS,
            "answer": "a drought",
            "label": label,
        }
    ]


def test_whole_arc_sample_is_read():
    items = arc.read(shared("arc/ARC-Challenge-Dev.jsonl"))
    assert len(items) == 294
    assert [sum(len(item["options"]) == n for item in items) for n in (3, 4)] == [3, 291]
    assert all(item["answer"] in item["options"] for item in items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answerKey": "A"}, "field 'answerKey': 'A' is none of 1, 2, 3, 4"),
        ({"answerKey": 3}, "field 'answerKey' must be a string, got int"),
        ({"choices": {"text": TEXTS, "label": ["1", "2"]}}, "a text and a label of its own"),
        ({"choices": {"text": TEXTS, "label": ["1"] * 4}}, "a text and a label of its own"),
        ({"choices": {"text": TEXTS, "label": [1, 2, 3, 4]}}, "must hold strings"),
        ({"choices": {"text": [], "label": []}}, "field 'text' is empty"),
        ({"question": {"stem": "Why?"}}, "field 'choices' is missing"),
        ({"question": {"stem": "Why?", "choices": ["x"]}}, "expected an object, got str"),
        ({"question": ""}, "field 'question' is empty"),
    ],
)
def test_broken_arc_item_names_file_and_line(tmp_path, changes, message):
    good, _ = LAYOUTS["numbers, choices as lists"]
    source = tmp_path / "arc.jsonl"
    source.write_text(f"{json.dumps(good)}\n\n{json.dumps({**good, **changes})}\n")
    with pytest.raises(UserError) as caught:
        arc.read(source)
    assert str(caught.value).startswith(f"{source} line 3: ") and message in str(caught.value)


# --- All of them ---------------------------------------------------------------------------------

names = st.sampled_from(
    """question answer stem choices text label answerKey test_example query chain_of_thought
    example1 example2""".split()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["A", "True", "", "#### 1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@examples(300)
@given(st.dictionaries(names, values, max_size=4) | values)
def test_any_json_is_converted_or_refused_by_name(raw):
    for convert in (arc.convert, prontoqa.convert):
        try:
            convert(raw, "FILE")
        except UserError as error:
            assert error.where.startswith("FILE")
