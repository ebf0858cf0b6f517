"""The latent tree of every question of a data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coconut.errors import UserError
from coconut.inside.analyses.asking import Options
from coconut.inside.findings import READINGS
from coconut.inside.graph import Graph, read_graph
from coconut.inside.lens import Lens

DRAWN = 2
"""Thoughts whose values are drawn question by question, as in the paper."""


@dataclass(frozen=True)
class Tree:
    """A question's values: [k][node] after k thoughts, and the probability of the lead."""

    graph: Graph
    values: list[list[float]]
    leads: list[float]


def read_trees(lens: Lens, options: Options, advance: Callable[[int], None]) -> list[Tree]:
    """The tree of each question, by the options' reading. Raises UserError if it is no ProsQA."""
    trees = []
    for item in options.items:
        graph = read_graph(item["question"])
        if graph is None or graph.right is None:
            raise UserError("data", f"not a ProsQA question: {item['question'][:60]}...")
        lens.check(item["question"], 1, graph)
        read = lens.reading(item["question"], graph, options.reading)
        trees.append(Tree(graph, read.values, read.lead_probability))
        advance(1)
    return trees


def about_reading(lens: Lens, options: Options, trees: Sequence[Tree]) -> dict[str, Any]:
    """What was read, and how probable the lead was after each number of thoughts."""
    return {
        "reading": options.reading,
        "reading_means": READINGS[options.reading],
        "lead_probability": np.mean([tree.leads for tree in trees], axis=0).tolist(),
    }
