"""Distances and paths in a ProsQA graph: edges sorted by child, parents before children."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate


def distances(edges: Sequence[Sequence[int]], sources: Iterable[int]) -> dict[int, int]:
    """Hops from the nearest source to every node that can be reached."""
    distance = dict.fromkeys(sources, 0)
    for parent, child in edges:
        if parent in distance:
            reached = distance[parent] + 1
            if reached < distance.get(child, reached + 1):
                distance[child] = reached
    return distance


def shortest_path(
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
