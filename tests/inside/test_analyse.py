"""Analyses over a data set: each number against a slow count, files that come again the same."""

from __future__ import annotations

import json
from dataclasses import replace

import naive
import numpy as np
import pytest
from lenses import write_checkpoint
from tiny import write_items

from coconut.inside import analyse
from coconut.inside.analyses import ablate, asking, forced_k, height, parallelism, shifted
from coconut.inside.analyses.height import _heights, _leading_to
from coconut.inside.analyses.trees import Tree
from coconut.inside.graph import read_graph
from coconut.inside.lens import Lens
from coconut.tasks import prosqa, prosqa_graph
from coconut.text.answers import OUTCOMES, exact_match, extract

N, N_NEW, N_THOUGHTS = 6, 5, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("analyse") / "model", "statements")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    options = prosqa_graph.Options(nodes=8, min_hops=2)
    path = tmp_path_factory.mktemp("data") / "items.json"
    path.write_text(json.dumps(list(prosqa.generate(options, 7, N))))
    return path


def options_of(data, **changes) -> asking.Options:
    items = prosqa.read(data)
    values = {
        "items": items,
        "swapped": [prosqa.swap(item) for item in items],
        "batch_size": 4,
        "max_new_tokens": N_NEW,
        "reading": "fact",
        "seed": 1,
    }
    return asking.Options(**values | changes)


def oracle(lens, checkpoint, question, n_thoughts, given=None) -> str:
    t, model = lens.tokenizer, naive.GPT2.load(checkpoint)
    ids = [*t.encode(question + "\n"), t.start_id, *[t.latent_id] * n_thoughts, t.end_id]
    return t.decode(naive.generate(model, ids, t.latent_id, t.eos_id, N_NEW, given))


def nothing(n: int) -> None:
    pass


@pytest.mark.slow
def test_answers_after_forced_k_are_the_oracles(twin, checkpoint, data):
    lens, options = Lens(checkpoint, twin.run.make_backend), options_of(data)
    found = forced_k.measure(lens, options, nothing)
    for k, row in enumerate(found["rows"]):
        assert row["thoughts"] == k and row["n"] == N
        expected = [oracle(lens, checkpoint, i["question"], k) for i in options.items]
        assert asking.answers(lens, [i["question"] for i in options.items], options, k) == expected
        classes = [forced_k.outcome(i, t, k) for i, t in zip(options.items, expected, strict=True)]
        assert row["outcomes"] == {name: classes.count(name) for name in OUTCOMES}
    assert [row["thoughts"] for row in found["rows"]] == list(range(N_THOUGHTS + 1))


def test_right_answers_are_counted_as_asked_swapped_and_both(checkpoint, data, monkeypatch):
    options = options_of(data)
    lens = Lens(checkpoint, lambda *_: None)

    def said(lens, questions, options_, k, thoughts=None):
        # Right as asked but for the first, right swapped but for the last.
        items = options.items if questions[0] == options.items[0]["question"] else options.swapped
        texts = [f"### {item['answer']}" for item in items]
        texts[0 if items is options.items else -1] = "### Tom is a nothing."
        return texts

    monkeypatch.setattr(asking, "answers", said)
    row = forced_k.measure(lens, options, nothing)["rows"][0]
    assert (row["as_asked"], row["swapped"], row["both"]) == (N - 1, N - 1, N - 2)
    expected = {**dict.fromkeys(OUTCOMES, 0), "Correct Label": N - 1, "Incorrect Label": 1}
    assert row["outcomes"] == expected and set(forced_k.OUTCOME_COLOURS) == set(OUTCOMES)


@pytest.mark.slow
def test_other_thoughts_are_answered_as_the_oracle_does(twin, checkpoint, data):
    lens, options = Lens(checkpoint, twin.run.make_backend), options_of(data)
    found = {row["thoughts"]: row for row in ablate.measure(lens, options, nothing)["rows"]}
    forced = forced_k.measure(lens, options, nothing)["rows"]
    names = ("as_asked", "swapped", "both")
    for row, k in ((found["own"], N_THOUGHTS), (found["none"], 0)):
        assert [row[name] for name in names] == [forced[k][name] for name in names]
    questions = [i["question"] for i in options.items]
    # Each question gets its own, though batches are put together by length.
    assert [len(q) for q in questions] != sorted(len(q) for q in questions)
    drawn = np.random.default_rng(2).normal(0, 2, (N, N_THOUGHTS, 32)).astype(np.float32)
    assert asking.answers(lens, questions, options, N_THOUGHTS, drawn) == [
        oracle(lens, checkpoint, q, N_THOUGHTS, own)
        for q, own in zip(questions, drawn, strict=True)
    ]
    zeros = np.zeros((N, N_THOUGHTS, 32), np.float32)
    given = asking.answers(lens, questions, options, N_THOUGHTS, zeros)
    assert given == [oracle(lens, checkpoint, q, N_THOUGHTS, zeros[0]) for q in questions]
    hits = [
        exact_match(extract(text)[0], i["answer"])
        for text, i in zip(given, options.items, strict=True)
    ]
    assert found["zero"]["as_asked"] == sum(hits)


def test_every_change_is_what_it_says():
    rng = np.random.default_rng(0)
    own = [rng.standard_normal((5, 4, 3)).astype(np.float32) for _ in range(2)]
    before = [x.copy() for x in own]
    made = {name: change for name, _, change in ablate._changes(own, seed=3)}
    x = own[0]
    np.testing.assert_array_equal(made["own"](0), x)
    assert made["none"](0) is None and not made["zero"](0).any()
    assert np.ptp(made["mean"](0), axis=0).max() == 0
    np.testing.assert_allclose(made["mean"](0)[0], x.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(made["other name's"](0), own[1])
    another = made["another's"](0)
    places = [[np.array_equal(a, b) for b in x].index(True) for a in another]
    assert sorted(places) == list(range(5)) and all(i != p for i, p in enumerate(places))
    shuffled = made["shuffled"](0)
    np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(x, axis=1))
    assert not (shuffled == x).all(axis=2).any()
    noise = [(made[f"noise {s:g}"](0) - x) / s for s in ablate.NOISES]
    np.testing.assert_allclose(noise[0], noise[2], atol=1e-5)
    for i in range(4):
        changed = np.flatnonzero((made[f"mean at {i + 1}"](0) != x).any(axis=(0, 2)))
        assert changed.tolist() == [i]
    assert all(np.array_equal(a, b) for a, b in zip(own, before, strict=True))


GRAPH = (
    "Tom is a wumpus. Every wumpus is a lempus. Every lempus is a zumpus. Tom is a jompus."
    " Every wumpus is a rempus. Sam is a gorpus. Is Tom a zumpus or gorpus?"
)


def test_heights_and_the_nodes_that_lead_to_the_answer():
    graph = read_graph(GRAPH)
    heights = dict(zip(graph.nodes, _heights(graph), strict=True))
    assert heights == {
        **dict(Tom=1, wumpus=1, lempus=1, zumpus=0),
        **dict(jompus=0, rempus=0, Sam=1, gorpus=0),
    }
    upwards = "Every lempus is a zumpus. Every wumpus is a lempus. Tom is a wumpus."
    graph_up = read_graph(f"{upwards} Is Tom a zumpus or gorpus?")
    assert dict(zip(graph_up.nodes, _heights(graph_up), strict=True)) == {
        **dict(lempus=1, zumpus=0, wumpus=2, Tom=3, gorpus=0)
    }
    leading = {graph.nodes[node] for node in _leading_to(graph)}
    assert leading == {"Tom", "wumpus", "lempus", "zumpus"}


def test_tree_values_are_added_up_by_rank_and_by_side(checkpoint, data, monkeypatch):
    lens = Lens(checkpoint, lambda *_: None, 2)
    graph = read_graph(GRAPH)
    by_word = {"wumpus": 0.5, "jompus": 0.2, "lempus": 0.1, "rempus": 0.05, "gorpus": 0.04}
    values = [[by_word.get(word, 0.0) for word in graph.nodes]] * 3
    tree = Tree(graph, values, [0.5, 0.25, 0.125])
    for analysis in (parallelism, height):
        monkeypatch.setattr(analysis, "read_trees", lambda *_: [tree])
    options = options_of(data)
    rows = parallelism.measure(lens, options, nothing)["rows"]
    assert rows[1]["top"] == pytest.approx([0.5, 0.7, 0.8])
    assert rows[1]["frontier"] == pytest.approx(0.7)  # wumpus and jompus, of 6 concepts
    assert rows[1]["frontier_if_uniform"] == pytest.approx(0.89 * 2 / 6)
    assert rows[1]["below_asked"] == pytest.approx(0.85)
    found = height.measure(lens, options, nothing)["rows"]
    assert [(r["thoughts"], r["height"], r["is_right"], r["mean"]) for r in found] == [
        (1, 0, False, 0.2),
        (1, 1, True, 0.5),
        (2, 0, False, 0.05),
        (2, 1, True, 0.1),
    ]
    # Of 0.35, the mean of wumpus and jompus, and of 0.075, that of lempus and rempus.
    relative = [r["relative"] for r in found]
    assert relative == pytest.approx([0.2 / 0.35, 0.5 / 0.35, 0.05 / 0.075, 0.1 / 0.075])


@pytest.mark.slow
def test_where_thoughts_are_read_rows_and_panels_begin_with_the_first(checkpoint, data, twin):
    lens = Lens(checkpoint, twin.run.make_backend, 2)
    for reading, ks in (("thought", [1, 2]), ("answer", [0, 1, 2])):
        options = replace(options_of(data), reading=reading)
        found = parallelism.measure(lens, options, nothing)
        assert [row["thoughts"] for row in found["rows"]] == ks
        _, rows = parallelism.table(found)
        leads = [f"{found['lead_probability'][k]:.3f}" for k in ks]
        assert [row[:2] for row in rows] == [[k, lead] for k, lead in zip(ks, leads, strict=True)]
        assert parallelism.picture(found).startswith(b"\x89PNG")


def test_sets_differ_in_the_way_they_say(data):
    items = prosqa.read(data)
    shifts = {name: changes for name, _, changes in shifted._shifts(items)}
    base = shifts.pop("fresh")
    assert shifts.pop("the data") is None
    assert base["nodes"] == max(len(item["idx_to_symbol"]) for item in items)
    for name, changes in shifts.items():
        differing = {key for key in changes if changes[key] != base.get(key)}
        expected = {"more hops": {"min_hops", "max_hops"}, "denser": {"more_parents"}}
        alone = {"nodes"} if name.endswith("nodes") else {"equal_depth"}
        assert differing == expected.get(name, alone), name


def test_more_parents_make_denser_graphs():
    def edges(**changes) -> int:
        options = prosqa_graph.Options(nodes=12, min_hops=2, **changes)
        return sum(len(item["edges"]) for item in prosqa.generate(options, 5, 40))

    assert edges(more_parents=1) > 1.2 * edges() and edges(more_parents=0) == edges()


def run(twin, *argv) -> None:
    analyse.main(twin.__name__, twin.run.make_backend, list(map(str, argv)))


@pytest.mark.slow
def test_all_analyses_leave_the_same_files_again(twin, checkpoint, data, tmp_path, capsys):
    where = ["--model", checkpoint, "--data", data, "--items", 4, "--max-new-tokens", 4]
    run(twin, "all", *where, "--out", tmp_path / "a")
    assert "wrote" in capsys.readouterr().out
    names = {f"{name}.{end}" for name in analyse.ANALYSES for end in ("json", "md", "png")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    run(twin, "forced-k", *where, "--out", tmp_path / "b")
    for end in ("json", "md", "png"):
        file = f"forced-k.{end}"
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    found = json.loads((tmp_path / "a" / "ood.json").read_text())
    assert found["items"] == 4 and found["back_end"] == twin.__name__ and found["rows"]


@pytest.mark.slow
def test_the_twins_find_the_same(checkpoint, data, tmp_path):
    from conftest import CHOSEN, load_twin

    found = []
    for name in CHOSEN:
        lens, options = Lens(checkpoint, load_twin(name).run.make_backend), options_of(data)
        found.append(
            [ablate.measure(lens, options, nothing), parallelism.measure(lens, options, nothing)]
        )
    for other in found[1:]:
        assert other[0] == found[0][0]
        for ours, theirs in zip(found[0][1]["rows"], other[1]["rows"], strict=True):
            # Rounding of float32 through two layers; 3e-6 seen.
            np.testing.assert_allclose(ours["top"], theirs["top"], atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--items", "1"], "--items: must be at least 2"),
        (["--seed", "-1", "--batch-size", "0"], "2 problems"),
        (["--data", "none.json"], "none.json"),
    ],
)
def test_bad_input_ends_with_one_message(checkpoint, data, tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        analyse.main(
            "fake",
            lambda *_: None,
            [
                *("ablate", "--model", str(checkpoint), "--data", str(data)),
                *("--out", str(tmp_path / "out"), *argv),
            ],
        )
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_items_of_another_form_are_refused(checkpoint, tmp_path, capsys):
    path = write_items(tmp_path / "x.json", 2)
    items = json.loads(path.read_text())
    del items[1]["edges"]
    path.write_text(json.dumps(items))
    with pytest.raises(SystemExit):
        analyse.main(
            "fake",
            lambda *_: None,
            ["all", "--model", str(checkpoint), "--data", str(path), "--out", str(tmp_path / "o")],
        )
    assert "item 1" in capsys.readouterr().err
