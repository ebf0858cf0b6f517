"""Graphs of an item, edges (parent, child): distances, shortest paths, what may be wrong in one."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any


def distances(edges: Collection[Sequence[int]], sources: Iterable[int]) -> dict[int, int]:
    """Hops from the nearest source to every node that can be reached, the nearest first."""
    below: dict[int, list[int]] = {}
    for parent, child in edges:
        below.setdefault(parent, []).append(child)
    found: dict[int, int] = {}
    reached, hops = set(sources), 0
    while reached:
        found |= dict.fromkeys(reached, hops)
        reached = {c for node in reached for c in below.get(node, ()) if c not in found}
        hops += 1
    return found


def upwards(edges: Collection[Sequence[int]], sources: Iterable[int]) -> dict[int, int]:
    """Hops down to the nearest source from every node that leads to one."""
    return distances([(child, parent) for parent, child in edges], sources)


def ways(edges: Sequence[Sequence[int]], root: int) -> tuple[dict[int, list[int]], dict[int, int]]:
    """(parents, number) of the shortest ways from the root to every node that can be reached.

    A node's parents are those on a shortest way, in the edges' order.
    """
    distance = distances(edges, [root])
    above: dict[int, list[int]] = {node: [] for node in distance}
    for parent, child in edges:
        if parent in distance and distance[child] == distance[parent] + 1:
            above[child].append(parent)
    number = {root: 1}
    for node in list(distance)[1:]:
        number[node] = sum(number[parent] for parent in above[node])
    return above, number


def shortest_path(
    edges: Sequence[Sequence[int]], root: int, target: int, draw: Callable[[], float] | None = None
) -> list[int]:
    """The nodes of a shortest path, root first, drawn uniformly among all of them.

    Without `draw`: the one that, from the target upwards, takes the parent of least index.
    """
    above, number = ways(edges, root)
    path = [target]
    while path[-1] != root:
        choices = above[path[-1]]
        if draw is None:
            path.append(min(choices))
        elif len(choices) == 1:
            path.append(choices[0])
        else:
            weights = list(accumulate(number[node] for node in choices))
            path.append(choices[bisect_right(weights, draw() * weights[-1], 0, len(choices) - 1)])
    return path[::-1]


def graph_problems(item: Mapping[str, Any]) -> list[str]:
    """What is wrong with an item's graph, if it has one.

    `edges` (with idx_to_symbol, root and target) lets a printed chain be followed; `neg_target`
    beside them lets the item be asked about the other name.
    """
    is_swapped = "neg_target" in item
    if not is_swapped and "edges" not in item:
        return []
    symbols, edges = item.get("idx_to_symbol"), item.get("edges")
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        return ["idx_to_symbol must be a list of texts, as it has a graph"]

    def is_node(value: Any) -> bool:
        return type(value) is int and 0 <= value < len(symbols)

    def is_edge(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(is_node, value))

    if not isinstance(edges, list) or not all(map(is_edge, edges)):
        return ["edges must be a list of [parent, child], numbers of idx_to_symbol"]
    nodes = ("root", "target", *(["neg_target"] if is_swapped else []))
    if wrong := [name for name in nodes if not is_node(item.get(name))]:
        return [f"{name} must be a number of idx_to_symbol, as it has a graph" for name in wrong]
    if not is_swapped:
        return []
    other = 1 - item["root"]
    if other not in (0, 1) or len(symbols) < 2:
        return ["root must be 0 or 1, one of the two names that neg_target lets ask for"]
    if item["neg_target"] not in distances(edges, [other]):
        return [f"neg_target cannot be reached from node {other}, the other name"]
    if ". " not in str(item.get("question")):
        return ["question holds no statement before what it asks, though it has neg_target"]
    return []
