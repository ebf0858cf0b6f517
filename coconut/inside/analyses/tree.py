"""What thoughts hold of a question's graph: side by side, and by the height of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.errors import UserError
from coconut.inside.findings import READINGS
from coconut.inside.graph import Graph, read_graph
from coconut.inside.lens import Lens

if TYPE_CHECKING:
    pass
from coconut.inside.analyses.asking import DRAWN, Options, Table

N_TREE = 3
"""Candidates whose value is added up."""


# --- the latent tree


@dataclass(frozen=True)
class _Tree:
    """A question's values: [k][node] after k thoughts, and the probability of the lead."""

    graph: Graph
    values: list[list[float]]
    leads: list[float]


def _trees(lens: Lens, options: Options, advance: Callable[[int], None]) -> list[_Tree]:
    trees = []
    for item in options.items:
        graph = read_graph(item["question"])
        if graph is None or graph.right is None:
            raise UserError("data", f"not a ProsQA question: {item['question'][:60]}...")
        lens.check(item["question"], 1, graph)
        read = lens.reading(item["question"], graph, options.reading)
        trees.append(_Tree(graph, read.values, read.lead_probability))
        advance(1)
    return trees


def _about_reading(lens: Lens, options: Options, trees: Sequence[_Tree]) -> dict[str, Any]:
    return {
        "reading": options.reading,
        "reading_means": READINGS[options.reading],
        "lead_probability": np.mean([tree.leads for tree in trees], axis=0).tolist(),
    }


def parallelism(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the best 1, 2, 3 candidates after each number of thoughts, question by question."""
    trees = _trees(lens, options, advance)
    rows = []
    # Where thoughts themselves are read, there is nothing to read before the first.
    for k in range(int(options.reading == "thought"), lens.n_thoughts + 1):
        tops, frontier, expected, on_tree = [], [], [], []
        for tree in trees:
            values = np.array(tree.values[k])
            tops.append(np.cumsum(np.sort(values)[::-1][:N_TREE]))
            near = tree.graph.frontier(k)
            below = [n for n, d in enumerate(tree.graph.distances) if d]
            on_tree.append(values[below].sum())
            if near:
                frontier.append(values[near].sum())
                # What a reader that knew no graph would give them: its mass spread over concepts.
                n_concepts = len(tree.graph.nodes) - len(tree.graph.names)
                expected.append(values.sum() * len(near) / n_concepts)
        rows.append(
            {
                "thoughts": k,
                "top": np.mean(tops, axis=0).tolist(),
                "below_asked": float(np.mean(on_tree)),
                "frontier": float(np.mean(frontier)) if frontier else None,
                "frontier_if_uniform": float(np.mean(expected)) if expected else None,
                "n_with_frontier": len(frontier),
                # Each curve sorted for itself, as in the paper's figure.
                "percentiles": np.sort(np.array(tops), axis=0).T.round(4).tolist()
                if k <= DRAWN
                else [],
            }
        )
    return {**_about_reading(lens, options, trees), "rows": rows}


def parallelism_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts: mean values."""
    columns = [
        "thoughts",
        "lead",
        "top 1",
        "top 2",
        "top 3",
        "below the name",
        "at k hops",
        "uniform",
    ]
    rows = [
        [
            row["thoughts"],
            f"{lead:.3f}",
            *(f"{value:.3f}" for value in row["top"]),
            f"{row['below_asked']:.3f}",
            "–" if row["frontier"] is None else f"{row['frontier']:.3f}",
            "–" if row["frontier"] is None else f"{row['frontier_if_uniform']:.3f}",
        ]
        for row in found["rows"]
        for lead in [found["lead_probability"][row["thoughts"]]]
    ]
    return columns, rows


def height(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the nodes k hops below the asked name after k thoughts, by their height.

    Height: least number of edges down to a leaf. Right: the node leads to the right answer (or is
    it). relative: in means of the nodes at that distance in the same question; where few nodes
    share a thought each has more, and few of them are wrong.
    """
    trees = _trees(lens, options, advance)
    rows = []
    for k in range(1, min(lens.n_thoughts, DRAWN) + 1):
        groups: dict[tuple[int, bool], list[tuple[float, float]]] = {}
        for tree in trees:
            heights, leads_to = _heights(tree.graph), _leading_to(tree.graph)
            near = tree.graph.frontier(k)
            mean = float(np.mean([tree.values[k][node] for node in near])) if near else 0.0
            for node in near:
                value = tree.values[k][node]
                group = groups.setdefault((heights[node], node in leads_to), [])
                group.append((value, value / mean if mean else 1.0))
        for (h, is_right), pairs in sorted(groups.items()):
            values, relative = np.array(pairs).T
            rows.append(
                {
                    "thoughts": k,
                    "height": h,
                    "is_right": is_right,
                    "n": len(values),
                    "mean": float(np.mean(values)),
                    "standard_error": float(np.std(values) / np.sqrt(len(values))),
                    "relative": float(np.mean(relative)),
                }
            )
    return {**_about_reading(lens, options, trees), "rows": rows}


def _heights(graph: Graph) -> list[int]:
    """Hops from each node down to its nearest leaf."""
    children: dict[int, list[int]] = {}
    for parent, child in graph.edges:
        children.setdefault(parent, []).append(child)
    found = [0 if node not in children else -1 for node in range(len(graph.nodes))]
    # A height is known once a child of one less is; the graph has no cycles to get lost in.
    for h in range(1, len(graph.nodes)):
        for node, below in children.items():
            if found[node] < 0 and any(found[child] == h - 1 for child in below):
                found[node] = h
    return found


def _leading_to(graph: Graph) -> set[int]:
    """The right answer and every node that leads to it."""
    assert graph.right is not None, "checked when the trees were made"
    found, queue = {graph.right}, [graph.right]
    while queue:
        node = queue.pop()
        above = {parent for parent, child in graph.edges if child == node} - found
        found |= above
        queue += sorted(above)
    return found


def height_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts, height and side."""
    columns = ["thoughts", "height", "node", "nodes", "mean value", "± s.e.", "relative"]
    rows = [
        [
            row["thoughts"],
            row["height"],
            "right" if row["is_right"] else "wrong",
            row["n"],
            f"{row['mean']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{row['relative']:.2f}",
        ]
        for row in found["rows"]
    ]
    return columns, rows
