"""ProsQA: fresh items from a seed, the swap test, shortcut rules, and statistics of files.

    python data/prosqa.py --items 17886 --seed 1 --out data/prosqa_train.json
    python data/prosqa.py --stats data/prosqa_valid.json data/prosqa_test.json

The construction was fitted to the official validation and test files; `data/README.md` tells it
step by step. Item i of a run depends on (seed, i) alone, so a run of any size is a prefix of a
longer one, and parts can be made apart. Only `random.Random.random` is used, whose values Python
guarantees, so the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from coconut.errors import UserError
from coconut.tasks.explore import explore, name_thoughts
from coconut.tasks.files import Item, field, parse_json, read_text
from coconut.tasks.generated import check_not_negative, digest_of_facts, draw_words
from coconut.tasks.graphs import distances, shortest_path

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
STEPS = ("path", "explore", "walk", "thoughts")


@dataclass(frozen=True)
class Options:
    """What kind of items to make; the defaults are the official distribution."""

    nodes: int = 28
    """Raw nodes of a graph, before isolated ones are dropped (4 to 40)."""
    min_hops: int = 3
    """Least distance from the head to the deepest leaf of either family."""
    max_hops: int = 6
    """Greatest such distance; also the most latents with steps="explore"."""
    swapped: float = 0.0
    """Share of items that ask about the other head: there the nearer concept is often right."""
    equal_depth: bool = False
    """Only items whose two concepts are equally far from their heads."""
    more_parents: int = 0
    """Parents that every node wants beyond those it draws: denser graphs."""
    steps: str = "path"
    """"path": a shortest path to the answer; "explore", "walk", "thoughts": see explore.py."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("nodes", "min_hops", "max_hops", "more_parents"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{name}: expected a whole number, got {value!r}")
        if isinstance(self.more_parents, int) and self.more_parents < 0:
            problems.append(f"more_parents: expected 0 or more, got {self.more_parents}")
        if not isinstance(self.swapped, (int, float)) or not 0 <= self.swapped <= 1:
            problems.append(f"swapped: expected a share from 0 to 1, got {self.swapped!r}")
        if not isinstance(self.equal_depth, bool):
            problems.append(f"equal_depth: expected true or false, got {self.equal_depth!r}")
        if self.steps not in STEPS:
            problems.append(f"steps: expected {', '.join(STEPS)}, got {self.steps!r}")
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
        n_parents = bisect_right(_PARENT_COUNTS, draw()) + options.more_parents
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
    names = iter(draw_words(draw, NAMES, n_names))
    concepts = iter(draw_words(draw, CONCEPTS, len(kept) - n_names))
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
    path = shortest_path(edges, root, target, draw)
    asked = f"Is {symbols[root]} a {symbols[pair[0]]} or {symbols[pair[1]]}?"
    item = {
        "question": " ".join([sentences[i] for i in order] + [asked]),
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": _sentences(path, symbols),
        "idx_to_symbol": symbols,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": neg_target,
    }
    if options.steps == "path":
        return item
    if options.steps == "thoughts":
        return name_thoughts(item, options.max_hops, draw)
    return explore(item, options.max_hops, draw, options.steps == "walk")


def keys(item: Item) -> tuple[bytes, bytes]:
    """Digests of the item's text and of its graph (sentences in any order, whatever is asked)."""
    *facts, _ = item["question"].split(". ")
    return blake2b(item["question"].encode(), digest_size=16).digest(), digest_of_facts(facts)


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
    check_not_negative("ProsQA generator", seed=seed, start=start, n_items=n_items)
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
        "steps": _sentences(shortest_path(item["edges"], root, target), symbols),
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
        if leaf not in distances(edges, [head]):
            raise UserError(where, f"node {leaf} cannot be reached from node {head}")
    if len(question.split(". ")) != len(edges) + 1:
        raise UserError(where, "field 'question' does not hold one sentence for each edge")


# --- What an item looks like: statistics and shortcut rules ---------------------------------------


def _hops(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)
