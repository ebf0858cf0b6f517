"""The random graphs of ProsQA: what kind to make, and one of them with its question."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from coconut.errors import UserError
from coconut.tasks.words import CONCEPTS

# A node's kind is the union of what it descends from: bit 1 head 0, bit 2 head 1.
_NEITHER, _A, _B = 0, 1, 2
_MAX_NODES = len(CONCEPTS) + 2  # never more concepts than there are words for

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
    families = (a_nodes[1:], b_nodes[1:])
    leaves = [[node for node in family if not is_parent[node]] for family in families]
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
