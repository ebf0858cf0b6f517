"""ProsQA: fresh items from a seed, the swap test, shortcut rules, and statistics of files.

    python data/prosqa.py --items 17886 --seed 1 --out data/prosqa_train.json
    python data/prosqa.py --stats data/prosqa_valid.json data/prosqa_test.json

The construction was fitted to the official validation and test files; `data/README.md` tells it
step by step. Item i of a run depends on (seed, i) alone, so a run of any size is a prefix of a
longer one, and parts can be made apart. Only `random.Random.random` is used, whose values Python
guarantees, so the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import accumulate, pairwise
from math import sqrt
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Any, NamedTuple

if not __package__:  # run as `python data/prosqa.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut.errors import UserError
from data.files import Item, command, field, parse_json, read_text, write_items

NAMES = tuple(
    """Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom
    Wren""".split()
)
CONCEPTS = tuple(
    """bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus
    impus jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus
    shumpus sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus
    zhorpus zumpus""".split()
)

TRAIN_ITEMS, TRAIN_SEED = 17_886, 1  # as many as the official training set has
"""The training set of the project; validation and test have seeds 2 and 3."""

# A node's kind is the union of what it descends from: bit 1 head 0, bit 2 head 1.
_NEITHER, _A, _B = 0, 1, 2
_MAX_NODES = len(CONCEPTS) + 2  # never more concepts than there are words for
_MAX_TRIES = 200_000  # raw graphs for one item; the rarest sensible options need some hundreds

# Poisson(1.5): P(count <= k). The first term is exp(-1.5), written out because libm may differ in
# the last bit between machines.
_PARENT_COUNTS = list(
    accumulate(accumulate(range(1, 25), lambda p, k: p * 1.5 / k, initial=0.22313016014842982))
)
_FAMILY_A, _FAMILY_B = 0.35, 0.7  # the second is drawn only if the first fails: 0.35/0.455/0.195
_DEPTH_SLOPE = 1.5


@dataclass(frozen=True)
class Options:
    """What kind of items to make; the defaults are the official distribution."""

    nodes: int = 28
    """Raw nodes of a graph, before isolated ones are dropped (4 to 40)."""
    min_hops: int = 3
    """Least distance from the head to the deepest leaf of either family."""
    max_hops: int = 6
    """Greatest such distance; also the longest walk with steps="walk"."""
    swapped: float = 0.0
    """Share of items that ask about the other head: there the nearer concept is often right."""
    equal_depth: bool = False
    """Only items whose two concepts are equally far from their heads."""
    steps: str = "path"
    """"path": a shortest path to the answer; "walk": a random walk down from the asked head."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("nodes", "min_hops", "max_hops"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{name}: expected a whole number, got {value!r}")
        if not isinstance(self.swapped, (int, float)) or not 0 <= self.swapped <= 1:
            problems.append(f"swapped: expected a share from 0 to 1, got {self.swapped!r}")
        if not isinstance(self.equal_depth, bool):
            problems.append(f"equal_depth: expected true or false, got {self.equal_depth!r}")
        if self.steps not in ("path", "walk"):
            problems.append(f"steps: expected path or walk, got {self.steps!r}")
        if not any(p.startswith(("nodes", "min_hops", "max_hops")) for p in problems):
            if not 4 <= self.nodes <= _MAX_NODES:
                problems.append(f"nodes: expected 4 to {_MAX_NODES}, got {self.nodes}")
            if not 1 <= self.min_hops <= self.max_hops:
                problems.append(
                    f"hops: expected 1 <= min <= max, got {self.min_hops}-{self.max_hops}"
                )
            # Two heads, a path of min_hops below one, and below the other a wrong answer.
            needed = 2 + self.min_hops + (self.min_hops if self.equal_depth else 1)
            if self.nodes < needed:
                problems.append(
                    f"nodes: {self.min_hops} hops need at least {needed}, got {self.nodes}"
                )
        if problems:
            raise UserError("ProsQA options", *problems)


class _Raw(NamedTuple):
    """A kept raw graph: a list entry a node, and what is asked."""

    parents: list[list[int]]
    is_parent: list[bool]
    target: int
    neg_target: int
    root: int


def _raw_graph(draw: Callable[[], float], options: Options) -> _Raw | None:
    """One raw graph with its question, or None if the graph is to be discarded."""
    parents: list[list[int]] = [[], []]
    kinds, depths = [_A, _B], [0, 0]
    is_parent = [False] * options.nodes
    # A pool is its nodes and their running weights. Nodes are only ever appended.
    a_nodes, a_weights = [0], [1.0]
    b_nodes, b_weights = [1], [1.0]
    all_nodes, all_weights = [0, 1], [1.0, 2.0]

    for node in range(2, options.nodes):
        n_parents = bisect_right(_PARENT_COUNTS, draw())
        if draw() < _FAMILY_A:
            pool, weights = a_nodes, a_weights
        elif draw() < _FAMILY_B:
            pool, weights = b_nodes, b_weights
        else:
            pool, weights = all_nodes, all_weights
        last = len(pool) - 1
        if n_parents > last:
            n_parents = last + 1
        chosen: list[int] = []
        kind, depth = _NEITHER, _MAX_NODES  # deeper than any node of a family
        while len(chosen) < n_parents:
            # Drawing again on a repeat is the same as drawing from the rest with its own weights.
            parent = pool[bisect_right(weights, draw() * weights[last], 0, last)]
            if parent in chosen:
                continue
            chosen.append(parent)
            is_parent[parent] = True
            kind |= kinds[parent]
            if depths[parent] < depth:
                depth = depths[parent]
        depth += 1
        parents.append(chosen)
        kinds.append(kind)
        depths.append(depth)
        weight = 1.0
        if kind == _A:
            weight += _DEPTH_SLOPE * depth
            a_nodes.append(node)
            a_weights.append(a_weights[-1] + weight)
        elif kind == _B:
            weight += _DEPTH_SLOPE * depth
            b_nodes.append(node)
            b_weights.append(b_weights[-1] + weight)
        all_nodes.append(node)
        all_weights.append(all_weights[-1] + weight)

    # A head without children is no leaf: it is a name, and a name cannot be the answer.
    leaves = (
        [node for node in a_nodes[1:] if not is_parent[node]],
        [node for node in b_nodes[1:] if not is_parent[node]],
    )
    if not leaves[0] or not leaves[1]:
        return None
    hops = max(depths[leaf] for family in leaves for leaf in family)
    if not options.min_hops <= hops <= options.max_hops:
        return None
    deepest = [leaf for family in leaves for leaf in family if depths[leaf] == hops]
    target = deepest[int(draw() * len(deepest))]
    root = 0 if kinds[target] == _A else 1
    others = leaves[1 - root]
    neg_target = others[int(draw() * len(others))]
    if options.equal_depth and depths[neg_target] != hops:
        return None
    return _Raw(parents, is_parent, target, neg_target, root)


def _shortest_path(
    edges: Sequence[Sequence[int]], root: int, target: int, draw: Callable[[], float] | None = None
) -> list[int]:
    """The nodes of a shortest path, root first, drawn uniformly among all of them.

    Without `draw`: the one that, from the target upwards, takes the parent of least index.
    """
    distance, ways = {root: 0}, {root: 1}
    above: dict[int, list[int]] = {}
    # Edges stand in the order of their children and parents come before children, so that a parent
    # is finished when it is first read.
    for parent, child in edges:
        if parent not in distance:
            continue
        reached = distance[parent] + 1
        if reached < distance.get(child, reached + 1):
            distance[child], ways[child], above[child] = reached, ways[parent], [parent]
        elif reached == distance[child]:
            ways[child] += ways[parent]
            above[child].append(parent)
    path = [target]
    while path[-1] != root:
        choices = above[path[-1]]
        if draw is None:
            path.append(min(choices))
        elif len(choices) == 1:
            path.append(choices[0])
        else:
            weights = list(accumulate(ways[node] for node in choices))
            path.append(choices[bisect_right(weights, draw() * weights[-1], 0, len(choices) - 1)])
    return path[::-1]


def _walk(
    edges: Sequence[Sequence[int]], root: int, max_hops: int, draw: Callable[[], float]
) -> list[int]:
    """The nodes of a random walk down from `root`, to a leaf or `max_hops` edges long."""
    path = [root]
    while len(path) <= max_hops:
        children = [child for parent, child in edges if parent == path[-1]]
        if not children:
            break
        path.append(children[int(draw() * len(children))])
    return path


def _sample(draw: Callable[[], float], words: Sequence[str], n: int) -> list[str]:
    """n distinct words, uniformly, in random order."""
    pool = list(words)
    size = len(pool)
    for i in range(n):
        j = i + int(draw() * (size - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


def _sentences(path: Sequence[int], symbols: Sequence[str]) -> list[str]:
    """The sentences along a path that starts at a name."""
    return [
        f"{'Every ' if i else ''}{symbols[parent]} is a {symbols[child]}."
        for i, (parent, child) in enumerate(pairwise(path))
    ]


def _item(seed: int, index: int, options: Options, is_taken: Callable[[Item], bool]) -> Item:
    draw = Random(seed << 64 | index).random
    for _ in range(_MAX_TRIES):
        raw = _raw_graph(draw, options)
        if raw is not None:
            item = _write(draw, raw, options)
            if item is not None and not is_taken(item):
                return item
    raise UserError(
        "ProsQA options",
        f"item {index}: no new graph of {options.nodes} nodes with {options.min_hops} to "
        f"{options.max_hops} hops in {_MAX_TRIES:,} trials; widen the hops or change the nodes",
    )


def _write(draw: Callable[[], float], raw: _Raw, options: Options) -> Item | None:
    """Number, name and word a raw graph; None if there are too few names."""
    kept = [
        node
        for node, parents in enumerate(raw.parents)
        if node < 2 or parents or raw.is_parent[node]
    ]
    n_names = sum(not raw.parents[node] for node in kept)
    if n_names > len(NAMES):
        return None
    number = {node: i for i, node in enumerate(kept)}
    edges = [[number[parent], number[node]] for node in kept for parent in raw.parents[node]]
    names = iter(_sample(draw, NAMES, n_names))
    concepts = iter(_sample(draw, CONCEPTS, len(kept) - n_names))
    symbols = [next(concepts if raw.parents[node] else names) for node in kept]
    subjects = [
        f"Every {symbol}" if raw.parents[node] else symbol
        for node, symbol in zip(kept, symbols, strict=True)
    ]

    root, target, neg_target = raw.root, number[raw.target], number[raw.neg_target]
    sentences = [f"{subjects[parent]} is a {symbols[child]}." for parent, child in edges]
    keys = [draw() for _ in sentences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    pair = (target, neg_target) if draw() < 0.5 else (neg_target, target)
    if options.swapped and draw() < options.swapped:
        root, target, neg_target = 1 - root, neg_target, target
    if options.steps == "walk":
        path = _walk(edges, root, options.max_hops, draw)
    else:
        path = _shortest_path(edges, root, target, draw)
    asked = f"Is {symbols[root]} a {symbols[pair[0]]} or {symbols[pair[1]]}?"
    return {
        "question": " ".join([sentences[i] for i in order] + [asked]),
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": _sentences(path, symbols),
        "idx_to_symbol": symbols,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def keys(item: Item) -> tuple[bytes, bytes]:
    """Digests of the item's text and of its graph (sentences in any order, whatever is asked)."""
    *facts, _ = item["question"].split(". ")
    graph = ". ".join(sorted(facts))
    return (
        blake2b(item["question"].encode(), digest_size=16).digest(),
        blake2b(graph.encode(), digest_size=16, person=b"graph").digest(),
    )


def generate(
    options: Options,
    seed: int,
    n_items: int,
    start: int = 0,
    exclude: Collection[bytes] = frozenset(),
) -> Iterator[Item]:
    """Items start … start + n_items - 1 of the run with this seed.

    exclude: keys (see `keys`) of items that must not come again; no item comes twice in one call.
    An item that would is drawn anew from its own stream. A run continued at `start` therefore
    equals the unbroken one if the keys of the earlier items are in `exclude` (at the default size
    also without: repeats do not happen there).
    Raises UserError if seed, start or n_items is negative, or the options admit no further graph.
    """
    for name, value in (("seed", seed), ("start", start), ("n_items", n_items)):
        if value < 0:
            raise UserError("ProsQA generator", f"{name}: expected 0 or more, got {value}")
    return _generate(options, seed, n_items, start, exclude)


def _generate(
    options: Options, seed: int, n_items: int, start: int, exclude: Collection[bytes]
) -> Iterator[Item]:
    seen: set[bytes] = set()  # graphs alone: equal texts have equal graphs

    def is_taken(item: Item) -> bool:
        text, graph = keys(item)
        if graph in seen or graph in exclude or text in exclude:
            return True
        seen.add(graph)
        return False

    for index in range(start, start + n_items):
        yield _item(seed, index, options, is_taken)


def swap(item: Item) -> Item:
    """The same item asked about the other head: right and wrong concept change places.

    Of several shortest paths, `steps` takes the one that, from the target upwards, goes through the
    parents of least index.
    """
    symbols, root = item["idx_to_symbol"], 1 - item["root"]
    target, neg_target = item["neg_target"], item["target"]
    facts, asked = item["question"].rsplit(". ", 1)
    asked = asked.replace(f"Is {symbols[item['root']]} a ", f"Is {symbols[root]} a ", 1)
    return {
        **item,
        "question": f"{facts}. {asked}",
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": _sentences(_shortest_path(item["edges"], root, target), symbols),
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }


def read(path: Path | str) -> list[Item]:
    """The items of a ProsQA file with their graphs. A broken item is named by file and index."""
    items = parse_json(read_text(path), str(path))
    if not isinstance(items, list) or not items:
        raise UserError(str(path), "expected a JSON list of items that is not empty")
    for index, item in enumerate(items):
        _check(item, f"{path} item {index}")
    return items


def _check(item: Any, where: str) -> None:
    question = field(item, "question", str, where)
    field(item, "answer", str, where)
    steps = field(item, "steps", list, where)
    symbols = field(item, "idx_to_symbol", list, where)
    edges = field(item, "edges", list, where)
    if not all(isinstance(text, str) for text in steps + symbols):
        raise UserError(where, "fields 'steps' and 'idx_to_symbol' must hold strings")
    n_nodes = len(symbols)
    for name in ("root", "target", "neg_target"):
        value = field(item, name, int, where)
        if not 0 <= value < (2 if name == "root" else n_nodes):
            raise UserError(where, f"field {name!r}: {value} is no such node")
    previous = 0
    for edge in edges:
        if (
            not isinstance(edge, list)
            or len(edge) != 2
            or not all(type(node) is int for node in edge)
            or not 0 <= edge[0] < edge[1] < n_nodes
            or edge[1] < previous
        ):
            raise UserError(
                where, f"field 'edges': {edge!r} is not [parent, child], sorted by child"
            )
        previous = edge[1]
    root = item["root"]
    right, wrong = item["target"], item["neg_target"]
    for head, leaf in ((root, right), (1 - root, wrong)):
        if leaf not in _distances(edges, [head]):
            raise UserError(where, f"node {leaf} cannot be reached from node {head}")
    if len(question.split(". ")) != len(edges) + 1:
        raise UserError(where, "field 'question' does not hold one sentence for each edge")


# --- What an item looks like: statistics and shortcut rules ---------------------------------------


def _distances(edges: Sequence[Sequence[int]], sources: Iterable[int]) -> dict[int, int]:
    """Hops from the nearest source to every node that can be reached."""
    distance = dict.fromkeys(sources, 0)
    for parent, child in edges:
        if parent in distance:
            reached = distance[parent] + 1
            if reached < distance.get(child, reached + 1):
                distance[child] = reached
    return distance


class _View:
    """What statistics and rules ask of one item."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.edges: list[list[int]] = item["edges"]
        self.symbols: list[str] = item["idx_to_symbol"]
        self.root, self.right, self.wrong = item["root"], item["target"], item["neg_target"]
        n = len(self.symbols)
        self.parents: list[list[int]] = [[] for _ in range(n)]
        self.out = [0] * n
        for parent, child in self.edges:
            self.parents[child].append(parent)
            self.out[parent] += 1
        self.names = [node for node in range(n) if not self.parents[node]]
        self.below_root = _distances(self.edges, [self.root])
        self.below_other = _distances(self.edges, [1 - self.root])
        self.from_names = _distances(self.edges, self.names)
        *facts, self.asked = item["question"].split(". ")
        self.words = [fact.rstrip(".").removeprefix("Every ").split(" is a ") for fact in facts]
        self.place = {tuple(words): i for i, words in enumerate(self.words)}

    def ancestors(self, node: int) -> set[int]:
        found: set[int] = set()
        stack = [node]
        while stack:
            for parent in self.parents[stack.pop()]:
                if parent not in found:
                    found.add(parent)
                    stack.append(parent)
        return found

    def mentions(self, node: int) -> list[int]:
        """Indices of the sentences that name the node."""
        return [i for i, words in enumerate(self.words) if self.symbols[node] in words]

    def n_shortest_paths(self) -> int:
        ways = {self.root: 1}
        for parent, child in self.edges:
            if self.below_root.get(parent, -2) + 1 == self.below_root.get(child):
                ways[child] = ways.get(child, 0) + ways[parent]
        return ways[self.right]


def _within(hops: int, view: _View, node: int) -> float:
    return any(view.below_root.get(p, hops + 1) <= hops for p in view.parents[node])


def _nearness(view: _View, node: int) -> float:
    asked = view.mentions(view.root)
    return -fmean(abs(i - j) for i in view.mentions(node) for j in asked)


# A rule picks the concept with the greater score.
_SCORES: dict[str, Callable[[_View, int], float]] = {
    "farther from the nearest name": lambda v, n: v.from_names[n],
    "a parent within 3 hops of the asked name": partial(_within, 3),
    "a parent within 2 hops of the asked name": partial(_within, 2),
    "not within 2 hops of any name": lambda v, n: v.from_names[n] > 2,
    "more ancestors": lambda v, n: len(v.ancestors(n)),
    "fewer sentences end in it": lambda v, n: -len(v.parents[n]),
    "its parents have fewer children": lambda v, n: -fmean(v.out[p] for p in v.parents[n]),
    "first mentioned later": lambda v, n: v.mentions(n)[0],
    "no name sentence says it": lambda v, n: all(v.parents[p] for p in v.parents[n]),
    "named first in the question": lambda v, n: f" a {v.symbols[n]} or " in v.asked,
    "sentences nearer to the asked name's": _nearness,
    "last mentioned later": lambda v, n: v.mentions(n)[-1],
}


def _score(score: Callable[[_View, int], float], view: _View) -> float:
    right, wrong = score(view, view.right), score(view, view.wrong)
    return 0.5 if right == wrong else float(right > wrong)


def _shortcut(score: Callable[[_View, int], float], item: Item) -> float:
    return _score(score, _View(item))


shortcuts: dict[str, Callable[[Item], float]] = {
    name: partial(_shortcut, score) for name, score in _SCORES.items()
}
"""Rules that need no search from the name to the concept: 1 right, 0 wrong, 0.5 a tie."""


def shortcut_accuracies(items: Iterable[Item]) -> dict[str, float]:
    """The share of items each rule of `shortcuts` answers right; a tie counts one half."""
    views = [_View(item) for item in items]
    return {name: fmean(_score(score, view) for view in views) for name, score in _SCORES.items()}


def _measures(view: _View) -> dict[str, float]:
    item, out = view.item, view.out
    n = len(view.symbols)
    in_degrees = [len(parents) for parents in view.parents]
    leaves = [node for node in range(n) if not out[node]]
    root_only = view.below_root.keys() - view.below_other.keys()
    other_only = view.below_other.keys() - view.below_root.keys()
    both = view.below_root.keys() & view.below_other.keys()
    steps = view.below_root[view.right]
    places = [
        view.place[tuple(step[:-1].removeprefix("Every ").split(" is a "))]
        for step in item["steps"]
    ]
    scale = max(len(view.edges) - 1, 1)
    inner = [out[v] for v, hops in view.below_root.items() if out[v] and hops < steps]
    return {
        "nodes": n,
        "edges": len(view.edges),
        "shortest path length": steps,
        "number of shortest paths": view.n_shortest_paths(),
        "names (nodes without parents)": len(view.names),
        "root = 1": view.root,
        "leaves of the root's family": sum(leaf in root_only for leaf in leaves),
        "leaves of the other family": sum(leaf in other_only for leaf in leaves),
        "all leaves": len(leaves),
        "nodes below root only (with it)": len(root_only),
        "nodes below the other head only (with it)": len(other_only),
        "nodes below both": len(both),
        "nodes below neither": n - len(root_only) - len(other_only) - len(both),
        "nodes reached from root (with it)": len(view.below_root),
        "distance of wrong concept from its head": view.below_other[view.wrong],
        "in-degree of right concept": in_degrees[view.right],
        "in-degree of wrong concept": in_degrees[view.wrong],
        "out-degree of root": out[view.root],
        "out-degree of the other head": out[1 - view.root],
        "children of the further names, together": sum(out[v] for v in view.names if v > 1),
        "greatest out-degree": max(out),
        "greatest in-degree": max(in_degrees),
        "sd of out-degrees in the item": pstdev(out),
        "sd of in-degrees in the item": pstdev(in_degrees),
        "mean out-degree of inner nodes nearer to root than the target": fmean(inner),
        "greatest distance from root": max(view.below_root.values()),
        "greatest distance from the other head": max(view.below_other.values()),
        "index of right concept / (nodes - 1)": view.right / (n - 1),
        "index of wrong concept / (nodes - 1)": view.wrong / (n - 1),
        "index of right < index of wrong": view.right < view.wrong,
        "right concept named first in the question": f" {view.symbols[view.right]} or "
        in view.asked,
        "relative place of first step's sentence": places[0] / scale,
        "relative place of last step's sentence": places[-1] / scale,
        "last step's sentence after the first's": places[-1] > places[0],
        "all step sentences in reading order": places == sorted(places),
        "characters of the question": len(item["question"]),
        "words of the question": len(item["question"].split()),
    }


class Statistic(NamedTuple):
    """Mean and standard deviation of one figure over n items."""

    mean: float
    sd: float
    n: int


def statistics(items: Iterable[Item]) -> dict[str, Statistic]:
    """The figures that describe a set of items, row by row as in `data/README.md`."""
    columns: dict[str, list[float]] = {}
    for item in items:
        for name, value in _measures(_View(item)).items():
            columns.setdefault(name, []).append(float(value))
    return {name: Statistic(fmean(v), pstdev(v), len(v)) for name, v in columns.items()}


def distributions(items: Iterable[Item]) -> dict[str, dict[int, float]]:
    """Shares of each value of the six whole-number figures that define the set's shape."""
    counts: dict[str, Counter[int]] = {}
    for item in items:
        view = _View(item)
        measures = _measures(view)
        for name in (
            "shortest path length",
            "number of shortest paths",
            "names (nodes without parents)",
            "nodes",
            "distance of wrong concept from its head",
        ):
            counts.setdefault(name, Counter())[int(measures[name])] += 1
        counts.setdefault("parents of nodes from index 2 on", Counter()).update(
            len(parents) for parents in view.parents[2:]
        )
    return {
        name: {value: count[value] / count.total() for value in sorted(count)}
        for name, count in counts.items()
    }


# --- The command --------------------------------------------------------------------------------


def read_keys(path: Path | str) -> set[bytes]:
    """The keys of all items of a file (only `question` is needed)."""
    items = parse_json(read_text(path), str(path))
    if not isinstance(items, list):
        raise UserError(str(path), "expected a JSON list of items")
    found: set[bytes] = set()
    for index, item in enumerate(items):
        field(item, "question", str, f"{path} item {index}")
        found.update(keys(item))
    return found


def write(
    path: Path | str,
    options: Options,
    seed: int,
    n_items: int,
    disjoint: Iterable[Path | str] = (),
) -> None:
    """Generate a file, disjoint by text and by graph from the given ones, with a progress bar.

    The file appears whole or not at all. Raises UserError on bad options or unreadable files.
    """
    from rich.console import Console
    from rich.progress import Progress

    exclude = frozenset[bytes]().union(*(read_keys(other) for other in disjoint))
    items = generate(options, seed, n_items, exclude=exclude)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        write_items(path, progress.track(items, total=n_items, description=str(path)))


def ensure_train(path: Path | str) -> None:
    """Generate the training set at `path` if there is no file: the same bytes everywhere."""
    if not Path(path).exists():
        here = Path(__file__).parent
        held_out = [here / "prosqa_valid.json", here / "prosqa_test.json"]
        write(path, Options(), TRAIN_SEED, TRAIN_ITEMS, held_out)


def _print_stats(paths: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    sets = [read(path) for path in paths]
    # Unless a terminal sets the width, nothing is cut off.
    width = 110 + sum(max(len(path), 24) + 16 for path in paths)
    console = Console() if sys.stdout.isatty() else Console(width=width)

    def table(title: str, *extra: str) -> Table:
        made = Table()
        made.add_column(title)
        for heading in (*paths, *extra):
            made.add_column(heading, justify="right")
        return made

    figures = [statistics(items) for items in sets]
    is_pair = len(sets) == 2
    means = table("mean ± sd", *(["difference / standard error"] if is_pair else []))
    means.add_row("items", *(str(len(items)) for items in sets))
    for name in figures[0]:
        row = [f[name] for f in figures]
        cells = [f"{s.mean:.3f} ± {s.sd:.3f}" for s in row]
        if is_pair:
            error = sqrt(sum(s.sd**2 / s.n for s in row))
            cells.append(f"{(row[0].mean - row[1].mean) / error:+.1f}" if error else "–")
        means.add_row(name, *cells)
    console.print(means)

    shares = [distributions(items) for items in sets]
    for name in shares[0]:
        dist = table(f"{name}, per cent")
        for value in sorted(set().union(*(s[name] for s in shares))):
            dist.add_row(str(value), *(f"{100 * s[name].get(value, 0):.1f}" for s in shares))
        console.print(dist)

    rules = Table()
    rules.add_column("shortcut rule, per cent right: choose the concept …")
    columns = []
    for path, items in zip(paths, sets, strict=True):
        rules.add_column(path, justify="right")
        rules.add_column("swapped", justify="right")
        columns += [shortcut_accuracies(items), shortcut_accuracies(map(swap, items))]
    for name in shortcuts:
        rules.add_row(name, *(f"{100 * column[name]:.1f}" for column in columns))
    console.print(rules)


def _hops(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> None:
    """The command line; see the head of this file."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="data/prosqa.py", description="Generate ProsQA items, or compare files of them."
    )
    parser.add_argument("--items", type=int, metavar="N", help="how many items to write")
    parser.add_argument("--seed", type=int, help="0 or more; the same seed gives the same bytes")
    parser.add_argument("--out", metavar="FILE", help="the JSON file to write")
    parser.add_argument("--nodes", type=int, default=default.nodes, help="raw nodes (%(default)s)")
    parser.add_argument(
        "--hops",
        type=_hops,
        default=(default.min_hops, default.max_hops),
        metavar="MIN-MAX",
        help=f"hops to the answer ({default.min_hops}-{default.max_hops})",
    )
    parser.add_argument(
        "--swapped",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="ask the other head (%(default)s)",
    )
    parser.add_argument("--equal-depth", action="store_true", help="both concepts equally deep")
    parser.add_argument("--steps", choices=("path", "walk"), default="path", help="(%(default)s)")
    parser.add_argument(
        "--disjoint", nargs="+", default=[], metavar="FILE", help="files to share no item with"
    )
    parser.add_argument("--stats", nargs="+", metavar="FILE", help="compare files, write nothing")
    args = parser.parse_args()
    if args.stats:
        _print_stats(args.stats)
        return
    missing = [f"--{name}" for name in ("items", "seed", "out") if getattr(args, name) is None]
    if missing:
        parser.error(f"needed to generate: {', '.join(missing)} (or give --stats FILE)")
    options = Options(
        nodes=args.nodes,
        min_hops=args.hops[0],
        max_hops=args.hops[1],
        swapped=args.swapped,
        equal_depth=args.equal_depth,
        steps=args.steps,
    )
    write(args.out, options, args.seed, args.items, args.disjoint)
    print(f"wrote {args.items:,} items | {args.out} | seed {args.seed}")


if __name__ == "__main__":
    command(main)
