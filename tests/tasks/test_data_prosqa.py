"""The ProsQA generator against the official set's properties, statistics and shortcuts."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from coconut.errors import UserError
from coconut.tasks import prosqa, prosqa_graph
from coconut.tasks.generated import read_keys, write
from coconut.tasks.graphs import shortest_path
from coconut.tasks.prosqa import generate, keys, swap
from coconut.tasks.prosqa_graph import Options
from coconut.tasks.prosqa_stats import shortcut_accuracies, shortcuts, statistics

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "data"
TABLE = json.loads((HERE / "prosqa_statistics.json").read_text())
N_OFFICIAL, N_TABLE = 800, 20_000

# A: Tom -> wumpus -> lempus -> rompus;  B: Max -> zumpus.  The deepest leaf is right.
SMALL = {
    "question": "Every lempus is a rompus. Max is a zumpus. Tom is a wumpus. "
    "Every wumpus is a lempus. Is Tom a zumpus or rompus?",
    "answer": "Tom is a rompus.",
    "steps": ["Tom is a wumpus.", "Every wumpus is a lempus.", "Every lempus is a rompus."],
    "idx_to_symbol": ["Tom", "Max", "wumpus", "lempus", "rompus", "zumpus"],
    "edges": [[0, 2], [2, 3], [3, 4], [1, 5]],
    "root": 0,
    "target": 4,
    "neg_target": 5,
}


@pytest.fixture(scope="module")
def sample():
    return list(generate(Options(), seed=5, n_items=2_000))


@pytest.fixture(scope="module")
def official():
    return prosqa.read(HERE / "prosqa_official.json")


def shared(name):
    directory = os.environ.get("COCONUT_SHARED_DATA")
    if not directory:
        pytest.skip("COCONUT_SHARED_DATA is not set: no whole public files to compare with")
    return Path(directory) / name


def reached(edges, root):
    """Hops from root, by relaxing all edges until nothing changes: slow, but plainly right."""
    hops = {root: 0}
    for _ in edges:
        for parent, child in edges:
            if parent in hops:
                hops[child] = min(hops.get(child, math.inf), hops[parent] + 1)
    return hops


def sentence(symbols, parents, parent, child):
    every = "Every " if parents[parent] else ""
    return f"{every}{symbols[parent]} is a {symbols[child]}."


def assert_structure(item):
    """Every property that held for all official items."""
    symbols, edges = item["idx_to_symbol"], item["edges"]
    root, target, wrong = item["root"], item["target"], item["neg_target"]
    parents = {node: [p for p, c in edges if c == node] for node in range(len(symbols))}
    children = {p for p, _ in edges}
    body, asked = item["question"].rsplit(". ", 1)
    facts = [fact + "." for fact in body.split(". ")]
    assert Counter(facts) == Counter(sentence(symbols, parents, p, c) for p, c in edges)
    assert asked in (
        f"Is {symbols[root]} a {symbols[target]} or {symbols[wrong]}?",
        f"Is {symbols[root]} a {symbols[wrong]} or {symbols[target]}?",
    )
    assert all(parent < child for parent, child in edges)
    assert [child for _, child in edges] == sorted(child for _, child in edges)
    assert len({tuple(edge) for edge in edges}) == len(edges)
    assert {node for edge in edges for node in edge} == set(range(len(symbols)))
    assert len(set(symbols)) == len(symbols)
    for node, symbol in enumerate(symbols):
        assert symbol in (prosqa.CONCEPTS if parents[node] else prosqa.NAMES)
    assert root in (0, 1)
    below, below_other = reached(edges, root), reached(edges, 1 - root)
    assert target in below and target not in below_other
    assert wrong in below_other and wrong not in below
    assert target not in children and wrong not in children
    assert item["answer"] == f"{symbols[root]} is a {symbols[target]}."
    assert set(item["steps"]) <= set(facts)
    path = [symbols[root]]
    for step in item["steps"]:
        subject, _, concept = step[:-1].removeprefix("Every ").partition(" is a ")
        assert subject == path[-1]
        path.append(concept)
    assert path[-1] == symbols[target]
    assert len(item["steps"]) == below[target]


def test_generated_items_have_every_property_of_the_official_ones(sample, official):
    for item in [*sample[:300], *official, SMALL]:
        assert_structure(item)


def test_whole_official_file_has_every_property():
    for item in prosqa.read(shared("prosqa_valid.json")):
        assert_structure(item)
        assert_structure(swap(item))


def test_fields_and_their_order_are_the_official_ones(sample, official):
    assert list(sample[0]) == list(official[0])


def test_hops_stay_in_range_and_the_right_concept_is_the_deepest_leaf(sample):
    for item in sample[:300]:
        hops = reached(item["edges"], item["root"])[item["target"]]
        assert 3 <= hops <= 6
        assert hops >= reached(item["edges"], 1 - item["root"])[item["neg_target"]]


@pytest.mark.slow
def test_means_lie_within_four_standard_errors_of_both_reference_sets(sample):
    found = statistics(sample)
    assert list(found) == list(TABLE)
    far = []
    for name, (mean, sd, other_mean, other_sd) in TABLE.items():
        got = found[name]
        for label, m, s, n in (
            ("official", mean, sd, N_OFFICIAL),
            ("independent", other_mean, other_sd, N_TABLE),
        ):
            error = math.sqrt(s**2 / n + got.sd**2 / got.n)
            if abs(got.mean - m) > 4 * error:
                far.append((name, label, got.mean, m, error))
    assert not far


@pytest.mark.slow
def test_pool_probabilities_show_in_the_share_of_the_second_head(sample):
    assert statistics(sample)["root = 1"].mean == pytest.approx(0.62, abs=4 * 0.486 / 2_000**0.5)


def test_share_of_raw_graphs_kept():
    n = 3_000
    kept = sum(prosqa_graph._raw_graph(Random(i).random, Options()) is not None for i in range(n))
    assert kept / n == pytest.approx(0.935, abs=4 * math.sqrt(0.935 * 0.065 / n))


@pytest.mark.slow
def test_shortcuts_score_on_generated_items_as_on_official_ones(sample):
    accuracies = shortcut_accuracies(sample)
    # Official 800 items; the least standard error of a share there is about 1 %.
    published = {
        "farther from the nearest name": 0.916,
        "a parent within 3 hops of the asked name": 0.922,
        "a parent within 2 hops of the asked name": 0.704,
        "not within 2 hops of any name": 0.843,
        "more ancestors": 0.707,
        "fewer sentences end in it": 0.664,
        "its parents have fewer children": 0.644,
        "first mentioned later": 0.586,
        "no name sentence says it": 0.597,
        "named first in the question": 0.505,
        "sentences nearer to the asked name's": 0.501,
        "last mentioned later": 0.451,
    }
    assert list(accuracies) == list(published)
    for name, share in published.items():
        error = math.sqrt(share * (1 - share) * (1 / 800 + 1 / 2_000))
        assert accuracies[name] == pytest.approx(share, abs=4 * error), name


def test_a_rule_that_ignores_the_name_fails_on_the_swapped_item(sample):
    blind = [name for name in shortcuts if "asked name" not in name]
    assert len(blind) == 9
    for item in [*sample[:50], SMALL]:
        for name in blind:
            assert shortcuts[name](item) + shortcuts[name](swap(item)) == 1


def test_shortcuts_on_a_graph_small_enough_to_check_by_hand():
    scores = {name: rule(SMALL) for name, rule in shortcuts.items()}
    assert scores == {
        "farther from the nearest name": 1,
        "a parent within 3 hops of the asked name": 1,
        "a parent within 2 hops of the asked name": 1,
        "not within 2 hops of any name": 1,
        "more ancestors": 1,
        "fewer sentences end in it": 0.5,
        "its parents have fewer children": 0.5,
        "first mentioned later": 0,
        "no name sentence says it": 1,
        "named first in the question": 0,
        "sentences nearer to the asked name's": 0,
        "last mentioned later": 0,
    }


def test_statistics_of_a_graph_small_enough_to_check_by_hand():
    found = {name: figure.mean for name, figure in statistics([SMALL]).items()}
    expected = {
        "nodes": 6,
        "edges": 4,
        "shortest path length": 3,
        "number of shortest paths": 1,
        "names (nodes without parents)": 2,
        "root = 1": 0,
        "leaves of the root's family": 1,
        "leaves of the other family": 1,
        "nodes below root only (with it)": 4,
        "nodes below the other head only (with it)": 2,
        "nodes below both": 0,
        "nodes below neither": 0,
        "distance of wrong concept from its head": 1,
        "index of right concept / (nodes - 1)": 0.8,
        "right concept named first in the question": 0,
        "relative place of first step's sentence": 2 / 3,
        "relative place of last step's sentence": 0,
        "all step sentences in reading order": 0,
        "characters of the question": len(SMALL["question"]),
    }
    assert {name: found[name] for name in expected} == expected


def test_swap_makes_the_wrong_concept_right_and_keeps_the_facts(sample, official):
    for item in [*sample[:200], *official, SMALL]:
        other = swap(item)
        assert_structure(other)
        assert (other["root"], other["target"]) == (1 - item["root"], item["neg_target"])
        assert other["neg_target"] == item["target"]
        assert other["question"].rsplit(". ", 1)[0] == item["question"].rsplit(". ", 1)[0]
        # The two concepts keep their order: only the name changes.
        assert other["question"].split(" a ")[-1] == item["question"].split(" a ")[-1]
        assert swap(other)["question"] == item["question"]
        assert swap(item) == other


def test_same_seed_gives_the_same_bytes_as_the_shipped_files():
    for name, n, seed in (("valid", 300, 2), ("test", 500, 3)):
        shipped = json.loads((ROOT / "data" / f"prosqa_made_{name}.json").read_text())
        assert list(generate(Options(), seed, n)) == shipped


def test_first_items_of_the_training_set_never_change():
    text = json.dumps(list(generate(Options(), TRAIN_SEED, 100)))
    assert sha256(text.encode()).hexdigest() == FIRST_100_OF_TRAIN


TRAIN_SEED = 1  # as in args/prosqa_*.yaml
FIRST_100_OF_TRAIN = "a71e366c4fc60e88622d31eb09d03334e557dc7aace2acb0755cfb90659696d5"


def test_any_size_is_a_prefix_and_parts_can_be_made_apart():
    whole = list(generate(Options(), 9, 30))
    assert list(generate(Options(), 9, 12)) == whole[:12]
    assert list(generate(Options(), 9, 18, start=12)) == whole[12:]
    assert list(generate(Options(), 10, 30)) != whole


def test_excluded_items_are_drawn_anew_and_no_item_comes_twice():
    whole = list(generate(Options(), 9, 10))
    taken = {key for item in whole[3:5] for key in keys(item)}
    others = list(generate(Options(), 9, 10, exclude=taken))
    assert [a == b for a, b in zip(whole, others, strict=True)] == [True] * 3 + [False] * 2 + [
        True
    ] * 5
    assert not taken & {key for item in others for key in keys(item)}


def test_repeats_are_told_by_graph_whatever_is_asked_and_in_which_order():
    text, graph = keys(SMALL)
    assert keys(swap(SMALL))[1] == graph and keys(swap(SMALL))[0] != text
    facts = SMALL["question"].split(". ")
    shuffled = {**SMALL, "question": ". ".join([*reversed(facts[:-1]), facts[-1]])}
    assert keys(shuffled)[1] == graph and keys(shuffled)[0] != text


def test_one_run_never_repeats_a_graph(monkeypatch):
    # Few enough words that graphs do repeat without the check.
    monkeypatch.setattr(prosqa, "NAMES", prosqa.NAMES[:3])
    monkeypatch.setattr(prosqa, "CONCEPTS", prosqa.CONCEPTS[:3])
    # Two of three names and of three concepts, in two edges: 3 · 3 · 2 graphs, and all come.
    items = list(generate(Options(nodes=4, min_hops=1), 0, 18))
    assert len({keys(item)[1] for item in items}) == 18


def test_more_graphs_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(prosqa, "NAMES", prosqa.NAMES[:2])
    monkeypatch.setattr(prosqa, "CONCEPTS", prosqa.CONCEPTS[:2])
    monkeypatch.setattr(prosqa, "_MAX_TRIES", 500)
    with pytest.raises(UserError, match="no new graph of 4 nodes"):
        list(generate(Options(nodes=4, min_hops=1), 0, 100))


def test_shipped_files_share_no_item_and_no_graph_with_each_other():
    valid = read_keys(ROOT / "data" / "prosqa_made_valid.json", keys)
    test = read_keys(ROOT / "data" / "prosqa_made_test.json", keys)
    assert (len(valid), len(test)) == (600, 1000)
    assert not valid & test


@pytest.mark.slow
def test_training_set_shares_nothing_with_the_official_validation_file():
    official = read_keys(shared("prosqa_valid.json"), keys)
    train = generate(Options(), TRAIN_SEED, 17_886)
    assert not official & {key for item in train for key in keys(item)}
    for name in ("valid", "test"):
        assert not official & read_keys(ROOT / "data" / f"prosqa_made_{name}.json", keys)


def test_swapped_share_asks_the_other_head_on_the_same_graphs():
    plain = list(generate(Options(), 3, 400))
    mixed = list(generate(Options(swapped=0.5), 3, 400))
    for item in mixed:
        assert_structure(item)
    n_swapped = sum(a["root"] != b["root"] for a, b in zip(plain, mixed, strict=True))
    assert 150 < n_swapped < 250
    accuracy = shortcut_accuracies(mixed)["farther from the nearest name"]
    assert accuracy == pytest.approx(0.5, abs=0.1)
    assert all(
        a["root"] != b["root"]
        for a, b in zip(plain, generate(Options(swapped=1), 3, 400), strict=True)
    )


def test_equal_depth_leaves_depth_nothing_to_tell():
    items = list(generate(Options(equal_depth=True), 3, 100))
    for item in items:
        assert_structure(item)
    assert shortcut_accuracies(items)["a parent within 3 hops of the asked name"] > 0.8
    hops = [
        (
            reached(item["edges"], item["root"])[item["target"]],
            reached(item["edges"], 1 - item["root"])[item["neg_target"]],
        )
        for item in items
    ]
    assert all(right == wrong for right, wrong in hops)


@pytest.mark.parametrize(
    "options",
    [
        Options(nodes=5, min_hops=1),
        Options(nodes=7, min_hops=1, max_hops=2),
        Options(nodes=40, min_hops=5, max_hops=8),
        Options(nodes=12, min_hops=2, equal_depth=True),
    ],
    ids=str,
)
def test_other_sizes_and_hops_keep_the_properties(options):
    for item in generate(options, 1, 40):
        assert_structure(item)
        hops = reached(item["edges"], item["root"])[item["target"]]
        assert options.min_hops <= hops <= options.max_hops
        assert len(item["idx_to_symbol"]) <= options.nodes


def test_walks_have_no_latents_and_print_one_concept_a_step():
    for item in generate(Options(nodes=8, min_hops=1, steps="walk"), 3, 50):
        assert item["latents"] == 0 and len(item["steps"]) == 6
        assert item["steps"][0].startswith(" is a ")


def test_exploration_says_its_latents_and_prints_what_that_many_hops_reach():
    plain = list(generate(Options(swapped=0.5), 3, 400))
    items = list(generate(Options(swapped=0.5, steps="explore"), 3, 400))
    kinds = Counter()
    for item, source in zip(items, plain, strict=True):
        assert item["question"] == source["question"]
        symbols, edges, latents = item["idx_to_symbol"], item["edges"], item["latents"]
        if not item["steps"]:
            kinds["final"] += 1
            assert latents == 6 and item["answer"] == source["answer"]
            continue
        children = {p: [c for q, c in edges if q == p] for p, _ in edges}
        frontier = {item["root"]}
        for _ in range(max(latents, 1)):
            frontier = {c for node in frontier for c in children.get(node, [node])}
        named = [symbols.index(s[:-1].rsplit(" ", 1)[1]) for s in [*item["steps"], item["answer"]]]
        name = symbols[item["root"]]
        if latents:
            kinds[latents] += 1
            assert all(step.startswith(f"{name} is a ") for step in item["steps"])
            assert set(named) <= frontier
            assert len(set(item["steps"])) == len(item["steps"]) == min(4, len(frontier))
        else:
            kinds["walk"] += 1
            assert len(item["steps"]) == 6
            assert named[-1] in frontier
            node = item["root"]
            for step, child in zip(item["steps"], named, strict=False):
                subject = step.split(" is a ")[0].removeprefix("Every ")
                node = symbols.index(subject) if subject else node
                assert child in children.get(node, [node])
                node = child
    assert kinds.keys() == {"final", "walk", *range(1, 7)}
    assert 0.3 < kinds["final"] / 400 < 0.5 and kinds[6] > 3 * kinds[1]


def test_every_thought_names_a_concept_that_so_many_hops_lead_to():
    plain = list(generate(Options(swapped=0.5), 3, 200))
    drawn = Counter()
    for item, source in zip(
        generate(Options(swapped=0.5, steps="thoughts"), 3, 200), plain, strict=True
    ):
        assert item["question"] == source["question"] and item["answer"] == source["answer"]
        assert item["steps"] == [] and item["latents"] == len(item["thoughts"]) == 6
        children: dict[int, list[int]] = {}
        for parent, child in item["edges"]:
            children.setdefault(parent, []).append(child)
        frontier = {item["root"]}
        for text in item["thoughts"]:
            frontier = {c for node in frontier for c in children.get(node, [node])}
            names = [f" is a {item['idx_to_symbol'][node]}." for node in sorted(frontier)]
            assert text in names
            drawn[len(names) > 1 and text == names[0]] += 1
    # Not always the same one of them: each thought stands for its whole frontier.
    assert 100 < drawn[True] < 600


def test_shortest_path_is_drawn_uniformly_among_all():
    # Three shortest paths 0-1-4-6, 0-2-4-6, 0-3-5-6 and a longer one.
    edges = [[0, 1], [0, 2], [0, 3], [1, 4], [2, 4], [3, 5], [4, 5], [4, 6], [5, 6]]
    draw = Random(1).random
    counts = Counter(tuple(shortest_path(edges, 0, 6, draw)) for _ in range(3_000))
    assert set(counts) == {(0, 1, 4, 6), (0, 2, 4, 6), (0, 3, 5, 6)}
    assert all(abs(count - 1_000) < 4 * math.sqrt(3_000 * 2 / 9) for count in counts.values())
    assert shortest_path(edges, 0, 6) == [0, 1, 4, 6]


def test_words_and_places_are_drawn_uniformly(sample):
    names, concepts = Counter(), Counter()
    for item in sample:
        for symbol in item["idx_to_symbol"]:
            (names if symbol in prosqa.NAMES else concepts)[symbol] += 1
    for counts, words in ((names, prosqa.NAMES), (concepts, prosqa.CONCEPTS)):
        mean = counts.total() / len(words)
        chi2 = sum((counts[word] - mean) ** 2 / mean for word in words)
        # Without replacement the spread is below chi-square's; 4 sd above its mean is far out.
        assert chi2 < len(words) + 4 * math.sqrt(2 * len(words))


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        Options(nodes=3, min_hops=5, max_hops=2, swapped=2, equal_depth=1, steps="explor")
    assert len(caught.value.problems) == 6
    with pytest.raises(UserError, match="5 hops need at least 12, got 10"):
        Options(nodes=10, min_hops=5, equal_depth=True)
    with pytest.raises(UserError, match=r"nodes: expected a whole number, got 28\.0"):
        Options(nodes=28.0)


def test_negative_seed_is_refused_before_the_first_item():
    # random.Random takes a seed's absolute value: -1 would silently be 1.
    with pytest.raises(UserError, match="seed: expected 0 or more, got -1"):
        generate(Options(), -1, 1)


def broken(**changes):
    return {**json.loads(json.dumps(SMALL)), **changes}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([], "expected an object, got list"),
        ({k: v for k, v in SMALL.items() if k != "edges"}, "field 'edges' is missing"),
        (broken(question=""), "field 'question' is empty"),
        (broken(root=True), "field 'root' must be a whole number, got bool"),
        (broken(root=2), "field 'root': 2 is no such node"),
        (broken(target=9), "field 'target': 9 is no such node"),
        (broken(target=5), "node 5 cannot be reached from node 0"),
        (broken(edges=[[0, 2], [3, 2]]), "[3, 2] is not [parent, child]"),
        (broken(edges=[[2, 3], [0, 2]]), "[0, 2] is not [parent, child]"),
        (broken(steps=[1]), "must hold strings"),
        (broken(question="Is Tom a zumpus or rompus?"), "one sentence for each edge"),
    ],
)
def test_broken_item_names_file_and_index(tmp_path, item, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([SMALL, item]))
    with pytest.raises(UserError) as caught:
        prosqa.read(path)
    assert str(caught.value).startswith(f"{path} item 1: ") and message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_file_that_is_no_list_of_items_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prosqa.read(path)
    assert caught.value.where == str(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@pytest.mark.slow
@examples(200)
@given(st.dictionaries(st.sampled_from(sorted(SMALL)), values, min_size=1, max_size=3))
def test_any_change_of_an_item_is_read_whole_or_refused(changes):
    path = ROOT / "unused"
    try:
        prosqa._check(broken(**changes), f"{path} item 0")
    except UserError as error:
        assert error.where == f"{path} item 0"


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_command_writes_the_same_bytes_as_a_script_and_as_a_module(tmp_path):
    options = ["--items", 20, "--seed", 4, "--hops", "2-4", "--nodes", 14, "--steps", "explore"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    script = run(ROOT / "data" / "prosqa.py", *options, "--out", one, cwd=tmp_path)
    module = run("-m", "data.prosqa", *options, "--out", two)
    assert (script.returncode, script.stderr, module.returncode) == (0, "", 0)
    assert script.stdout == f"wrote 20 items | {one} | seed 4\n"
    assert one.read_bytes() == two.read_bytes()
    expected = generate(Options(nodes=14, min_hops=2, max_hops=4, steps="explore"), 4, 20)
    assert json.loads(one.read_text()) == list(expected)


def test_command_keeps_a_new_file_disjoint_from_given_ones(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path, more in ((first, []), (second, ["--disjoint", first])):
        assert run("data/prosqa.py", "--items", 5, "--seed", 4, "--out", path, *more).stdout
    assert not read_keys(first, keys) & read_keys(second, keys)


STATS_FILES = (HERE / "prosqa_official.json", ROOT / "data" / "prosqa_made_valid.json")


def test_command_compares_two_files():
    done = run("data/prosqa.py", "--stats", *STATS_FILES)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    cells = [cell.strip() for cell in lines["nodes"].split("│")]
    mine, theirs = (statistics(items)["nodes"] for items in map(prosqa.read, STATS_FILES))
    error = math.sqrt(mine.sd**2 / 4 + theirs.sd**2 / 300)
    assert cells[2:5] == [
        f"{mine.mean:.3f} ± {mine.sd:.3f}",
        f"{theirs.mean:.3f} ± {theirs.sd:.3f}",
        f"{(mine.mean - theirs.mean) / error:+.1f}",
    ]
    for name in (*TABLE, *shortcuts):
        assert name in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", 3, "--seed", 1], "--out"),
        (["--items", 3, "--seed", 1, "--out", "x.json", "--nodes", 3], "ProsQA options"),
        (["--items", 3, "--seed", 1, "--out", "x.json", "--disjoint", "no.json"], "no.json"),
        (["--items", 3, "--seed", -1, "--out", "x.json"], "seed: expected 0 or more"),
        (["--stats", "no.json"], "no.json: cannot be read: No such file"),
    ],
)
def test_command_answers_bad_input_with_one_message_and_status_2(tmp_path, arguments, message):
    done = run(ROOT / "data" / "prosqa.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "set.json"
    write(path, generate, keys, Options(), 1, 3)
    before = path.read_bytes()

    def breaks(*_, **__):
        yield SMALL
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, breaks, keys, Options(), 2, 3)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_defaults_are_the_official_distribution():
    assert asdict(Options()) == {
        "nodes": 28,
        "min_hops": 3,
        "max_hops": 6,
        "swapped": 0.0,
        "equal_depth": False,
        "more_parents": 0,
        "steps": "path",
    }
    assert len(prosqa.NAMES) == 17 and len(prosqa.CONCEPTS) == 38
    for words in (prosqa.NAMES, prosqa.CONCEPTS):
        assert all(a < b for a, b in pairwise(words))
