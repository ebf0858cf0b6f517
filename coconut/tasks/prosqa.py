"""ProsQA: fresh items from a seed, the swap test, shortcut rules, and statistics of files.

    python data/prosqa.py --items 17886 --seed 1 --out data/prosqa_made_train.json
    python data/prosqa.py --stats data/prosqa_made_valid.json data/prosqa_made_test.json

The construction was fitted to the official validation and test files; `data/README.md` tells it
step by step. Item i of a run depends on (seed, i) alone, so a run of any size is a prefix of a
longer one, and parts can be made apart. Only `random.Random.random` is used, whose values Python
guarantees, so the same seed gives the same bytes on every machine.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from coconut.errors import UserError
from coconut.tasks.explore import explore, name_thoughts
from coconut.tasks.files import Item, field, read_records
from coconut.tasks.generated import check_not_negative, digest_of_facts, draw_words
from coconut.tasks.graphs import distances, shortest_path
from coconut.tasks.prosqa_graph import Options, _Raw, _raw_graph
from coconut.tasks.words import CONCEPTS, NAMES

_MAX_TRIES = 200_000  # raw graphs for one item; the rarest sensible options need some hundreds


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
    seen: set[bytes] = set()  # graphs alone: equal texts have equal graphs

    def is_taken(item: Item) -> bool:
        text, graph = keys(item)
        if graph in seen or graph in exclude or text in exclude:
            return True
        seen.add(graph)
        return False

    return (_item(seed, index, options, is_taken) for index in range(start, start + n_items))


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
    records = list(read_records(path))
    if not records:
        raise UserError(str(path), "holds no items")
    for where, item in records:
        _check(item, where)
    return [item for _, item in records]


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
        is_pair = isinstance(edge, list) and [type(node) for node in edge] == [int, int]
        if not is_pair or not 0 <= edge[0] < edge[1] < n_nodes or edge[1] < previous:
            problem = f"field 'edges': {edge!r} is not [parent, child], sorted by child"
            raise UserError(where, problem)
        previous = edge[1]
    root = item["root"]
    right, wrong = item["target"], item["neg_target"]
    for head, leaf in ((root, right), (1 - root, wrong)):
        if leaf not in distances(edges, [head]):
            raise UserError(where, f"node {leaf} cannot be reached from node {head}")
    if len(question.split(". ")) != len(edges) + 1:
        raise UserError(where, "field 'question' does not hold one sentence for each edge")
