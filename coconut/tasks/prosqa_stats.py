"""What a ProsQA file looks like: statistics, distributions, and how far shortcuts get on it."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import sqrt
from statistics import fmean, pstdev
from typing import NamedTuple

from coconut.tasks.files import Item
from coconut.tasks.graphs import distances, upwards, ways
from coconut.tasks.prosqa import read, swap


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
        self.below_root = distances(self.edges, [self.root])
        self.below_other = distances(self.edges, [1 - self.root])
        self.from_names = distances(self.edges, self.names)
        *facts, self.asked = item["question"].split(". ")
        self.words = [fact.rstrip(".").removeprefix("Every ").split(" is a ") for fact in facts]
        self.place = {tuple(words): i for i, words in enumerate(self.words)}

    def ancestors(self, node: int) -> set[int]:
        return upwards(self.edges, [node]).keys() - {node}

    def mentions(self, node: int) -> list[int]:
        """Indices of the sentences that name the node."""
        return [i for i, words in enumerate(self.words) if self.symbols[node] in words]

    def n_shortest_paths(self) -> int:
        return ways(self.edges, self.root)[1][self.right]


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


def print_stats(paths: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    sets = [read(path) for path in paths]
    # Unless a terminal sets the width, nothing is cut off.
    width = 110 + sum(max(len(path), 24) + 16 for path in paths)
    console = Console() if sys.stdout.isatty() else Console(width=width)

    def table(title: str, *columns: str) -> Table:
        made = Table()
        made.add_column(title)
        for heading in columns:
            made.add_column(heading, justify="right")
        return made

    figures = [statistics(items) for items in sets]
    is_pair = len(sets) == 2
    means = table("mean ± sd", *paths, *(["difference / standard error"] if is_pair else []))
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
        dist = table(f"{name}, per cent", *paths)
        for value in sorted(set().union(*(s[name] for s in shares))):
            dist.add_row(str(value), *(f"{100 * s[name].get(value, 0):.1f}" for s in shares))
        console.print(dist)

    title = "shortcut rule, per cent right: choose the concept …"
    rules = table(title, *(name for path in paths for name in (path, "swapped")))
    sides = (side for items in sets for side in (items, map(swap, items)))
    columns = [shortcut_accuracies(side) for side in sides]
    for name in shortcuts:
        rules.add_row(name, *(f"{100 * column[name]:.1f}" for column in columns))
    console.print(rules)
