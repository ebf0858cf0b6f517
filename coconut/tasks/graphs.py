"""Distances and shortest paths in a graph whose edges are (parent, child)."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate


def distances(edges: Collection[Sequence[int]], sources: Iterable[int]) -> dict[int, int]:
    """Hops from the nearest source to every node that can be reached, the nearest first."""
    found: dict[int, int] = {}
    reached, hops = set(sources), 0
    while reached:
        found |= dict.fromkeys(reached, hops)
        reached = {child for parent, child in edges if parent in reached and child not in found}
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
