"""ProsQA questions read back from their text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny import REPOSITORY

from coconut.inside.graph import read_graph, sentences
from coconut.tasks import prosqa
from coconut.tasks.suite import hops


@pytest.mark.parametrize(
    "file", ["prosqa_small_test.json", "prosqa_tiny.json", "prosqa_made_test.json"]
)
def test_graphs_of_items_are_read_back_from_their_questions(file):
    for item in prosqa.read(REPOSITORY / "data" / file)[:60]:
        graph = read_graph(item["question"])
        symbols = item["idx_to_symbol"]
        edges = {(symbols[parent], symbols[child]) for parent, child in item["edges"]}
        assert {(graph.nodes[p], graph.nodes[c]) for p, c in graph.edges} == edges
        assert graph.nodes[graph.asked] == symbols[item["root"]]
        assert graph.nodes[graph.right] == symbols[item["target"]]
        choices = {graph.nodes[choice] for choice in graph.choices}
        assert choices == {symbols[item["target"]], symbols[item["neg_target"]]}
        path = graph.path()
        assert len(path) == len(item["steps"]) + 1 == graph.distances[graph.right] + 1
        assert set(pairwise(path)) <= set(graph.edges)
        assert {graph.nodes[n] for n in graph.names} == {
            symbol for symbol in symbols if symbol[0].isupper()
        }


def test_a_question_without_choices_is_a_graph_too():
    for item in hops.generate(hops.Options(), 1, 20):
        graph = read_graph(item["question"])
        concepts = [n for n in range(len(graph.nodes)) if n not in graph.names]
        assert len(graph.edges) == len(graph.nodes) == 9 and len(concepts) == 8
        assert (graph.choices, graph.right, graph.path()) == ((), None, [])
        (last,) = graph.frontier(6)  # the name's own concept, and five behind it
        assert item["answer"] == f"{graph.nodes[graph.asked]} is a {graph.nodes[last]}."


def test_frontiers_hold_the_nodes_of_each_distance():
    graph = read_graph(
        "Tom is a a. Every a is a b. Tom is a b. Every b is a c. Sam is a d. Is Tom a c or d?"
    )
    words = [[graph.nodes[n] for n in graph.frontier(k)] for k in range(4)]
    assert words == [["Tom"], ["a", "b"], ["c"], []]
    assert graph.distances[graph.nodes.index("d")] is None


def test_a_choice_the_name_leads_to_alone_is_right():
    both = read_graph("Tom is a a. Tom is a b. Is Tom a a or b?")
    neither = read_graph("Sam is a a. Sam is a b. Is Tom a a or c?")
    assert both.right is None is neither.right
    assert both.path() == neither.path() == []
    assert neither.nodes == ["Sam", "a", "b", "Tom", "c"]


def test_a_loop_of_statements_ends():
    graph = read_graph("Tom is a a. Every a is a b. Every b is a a. Is Tom a b or c?")
    assert graph.distances[graph.nodes.index("b")] == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Is Tom a a or b?",
        "Tom is a a.",
        "Tom has 3 apples. Is Tom a a or b?",
        "Tom is a a. Who?",
    ],
)
def test_other_texts_have_no_graph(text):
    assert read_graph(text) is None


@examples(60)
@given(st.text(max_size=60))
def test_any_text_is_cut_into_sentences_that_stand_in_it(text):
    parts = sentences(text)
    at = 0
    for part in parts:
        assert part.strip() == part != ""
        at = text.index(part, at) + len(part)
    assert "".join("".join(parts).split()) == "".join(text.split())
    read_graph(text)
