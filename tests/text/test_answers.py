"""What counts as the answer, the chain, and right."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.text import answers

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "answers.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["coconut_outputs"], ids=lambda case: case["text"][:20])
def test_the_published_rule_holds_to_the_letter(case):
    assert answers.published_answer(case["text"]) == case["answer"]
    assert answers.published_cot(case["text"]) == case["cot"]


@pytest.mark.parametrize("case", GOLDEN["coconut_text"])
def test_the_published_gold_is_what_a_perfect_generation_gives(case):
    inputs, outputs = case["inputs"], case["outputs"]
    assert answers.published_answer(inputs["answer"]) == outputs["reference_answer"]
    assert answers.cot_match(outputs["reference_cot"], inputs["steps"])
    steps = "".join(outputs["steps"])
    generated = steps + outputs["answer"].removesuffix("<eos>")
    answer, chain = answers.extract(generated)
    assert answers.exact_match(answer, outputs["reference_answer"])
    assert chain == outputs["reference_cot"]
    prompt = outputs["question"].removeprefix("<bos>")
    assert answers.published_cot(prompt + generated) == outputs["reference_cot"]


@pytest.mark.parametrize(
    ("text", "answer", "chain"),
    [
        ("### 7", "7", ""),
        ("a\nb\n### 1,450 ", "1,450", "a\nb"),
        ("a\n#### 7", "7", "a"),
        ("<|end-latent|>a\n<|latent|>### 7", "7", "a"),
        ("a ### 1 ### 2", "2", "a"),
        ("### C# 5", "C# 5", ""),
        ("no sign 25", "", "no sign 25"),
        ("one # 25", "", "one # 25"),
        ("a\n###", "", "a"),
        ("", "", ""),
    ],
)
def test_extraction_table(text, answer, chain):
    assert answers.extract(text) == (answer, chain)


def test_no_answer_is_wrong_even_where_the_gold_is_empty():
    assert not answers.exact_match("", "")
    assert not answers.numeric_match(" ", "")


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "numeric"),
    [
        ("1,450", "1450", True, True),
        ("5.0", "5", False, True),
        ("5.", "5", False, True),
        (".50", "0.5", False, True),
        ("-3", "3", False, False),
        ("+3", "3", False, True),
        ("3 apples", "3", False, False),
        ("True", "True", True, True),
        ("true", "True", False, False),
        ("1e3", "1000", False, False),
        ("NaN", "5", False, False),
        ("٥", "5", False, False),
        ("10000000000000000000000000000001", "10000000000000000000000000000000", False, False),
    ],
)
def test_match_table(answer, gold, exact, numeric):
    assert answers.exact_match(answer, gold) is exact
    assert answers.numeric_match(answer, gold) is numeric


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_can_be_judged(text, gold):
    answer, chain = answers.extract(text)
    if answers.exact_match(answer, gold):
        assert answers.numeric_match(answer, gold)
    assert "###" not in answer + "\n" + chain


def test_the_chain_is_compared_with_the_steps_that_remain():
    assert answers.cot_match("b\nc\n", ["b", "c"])
    assert answers.cot_match("", [])
    assert not answers.cot_match("c", ["b", "c"])


#   Tom -> a -> b -> t      Max -> d -> w
#   Tom -> c -> t           c -> b
SYMBOLS = ["Tom", "Max", "apus", "bpus", "cpus", "tpus", "dpus", "wpus"]
EDGES = [[0, 2], [2, 3], [3, 5], [0, 4], [4, 5], [4, 3], [1, 6], [6, 7]]
ITEM = {"idx_to_symbol": SYMBOLS, "edges": EDGES, "root": 0, "target": 5}
RIGHT = "Tom is a tpus."


@pytest.mark.parametrize(
    ("chain", "n_hidden", "outcome"),
    [
        (["Tom is a cpus.", "Every cpus is a tpus."], 0, "Correct Path"),
        (["Tom is a apus.", "Every apus is a bpus.", "Every bpus is a tpus."], 0, "Longer Path"),
        (["Tom is a apus.", "Every apus is a bpus."], 0, "Wrong Target"),
        (["Tom is a apus.", "Every apus is a tpus."], 0, "Hallucination"),
        (["Tom is a apus.", "Every cpus is a tpus."], 0, "Hallucination"),
        (["Every Tom is a cpus.", "Every cpus is a tpus."], 0, "Hallucination"),
        (["Tom is a cpus.", "cpus is a tpus."], 0, "Hallucination"),
        (["Tom is a cpus.", "Every cpus is a xpus."], 0, "Hallucination"),
        (["Tom likes cpus."], 0, "Hallucination"),
        (["Every cpus is a tpus."], 0, "Hallucination"),
        (["Every cpus is a tpus."], 1, "Correct Path"),
        (["Every bpus is a tpus."], 2, "Longer Path"),
        (["Every apus is a bpus."], 1, "Wrong Target"),
        (["Every dpus is a wpus."], 1, "Hallucination"),
        (["Tom is a cpus.", "Every cpus is a tpus."], 1, "Correct Path"),
    ],
)
def test_outcome_of_a_printed_chain(chain, n_hidden, outcome):
    assert outcome in answers.OUTCOMES
    assert answers.classify_chain(ITEM, chain, "anything", n_hidden) == outcome


def test_without_a_chain_the_label_decides():
    assert answers.classify_chain(ITEM, ["", " "], RIGHT) == "Correct Label"
    assert answers.classify_chain(ITEM, [], "Tom is a wpus.") == "Incorrect Label"
    assert answers.classify_chain(ITEM, [], "") == "Incorrect Label"


def test_each_given_chain_of_the_shipped_items_is_a_correct_path():
    for path in sorted((Path(__file__).parents[2] / "data").glob("prosqa_*.json")):
        for item in json.loads(path.read_text())[:50]:
            for n_hidden in range(len(item["steps"])):
                shown = item["steps"][n_hidden:]
                outcome = answers.classify_chain(item, shown, item["answer"], n_hidden)
                assert outcome == "Correct Path"
            assert answers.classify_chain(item, [], item["answer"]) == "Correct Label"
