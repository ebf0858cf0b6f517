"""What thoughts hold of a question's graph by the height of its nodes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from coconut.inside.analyses.asking import Analysis, Options, Table
from coconut.inside.analyses.axes import grid, say_lead, title
from coconut.inside.analyses.trees import DRAWN, about_reading, read_trees
from coconut.inside.graph import Graph
from coconut.inside.lens import Lens
from coconut.reporting.drawing import figure_of, png
from coconut.tasks.graphs import upwards


def measure(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the nodes k hops below the asked name after k thoughts, by their height.

    Height: least number of edges down to a leaf. Right: the node leads to the right answer (or is
    it). relative: in means of the nodes at that distance in the same question; where few nodes
    share a thought each has more, and few of them are wrong.
    """
    trees = read_trees(lens, options, advance)
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
    return {**about_reading(lens, options, trees), "rows": rows}


def _heights(graph: Graph) -> list[int]:
    """Hops from each node down to its nearest leaf."""
    nodes = range(len(graph.nodes))
    # Every way down ends: the graph has no cycles.
    hops = upwards(graph.edges, set(nodes) - {parent for parent, _ in graph.edges})
    return [hops[node] for node in nodes]


def _leading_to(graph: Graph) -> set[int]:
    """The right answer and every node that leads to it."""
    assert graph.right is not None, "checked when the trees were made"
    return set(upwards(graph.edges, [graph.right]))


def table(found: dict[str, Any]) -> Table:
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


def picture(found: dict[str, Any]) -> bytes:
    """Mean value against height; right nodes solid, wrong ones dashed."""
    rows = found["rows"]
    ks = sorted({row["thoughts"] for row in rows}) or [1]
    most = max((row["mean"] + row["standard_error"] for row in rows), default=0.8)
    with figure_of(4.4 * len(ks), 3.6, len(ks), len(ks)) as (figure, axes):
        for ax, k in zip(axes, ks, strict=True):
            for is_right, style, colour in ((True, "-o", "#1a9e77"), (False, "--s", "#cc5fa0")):
                chosen = [r for r in rows if r["thoughts"] == k and r["is_right"] == is_right]
                if not chosen:
                    continue
                x = [row["height"] for row in chosen]
                y = [row["mean"] for row in chosen]
                errors = [row["standard_error"] for row in chosen]
                word = "leads to the answer" if is_right else "does not"
                ax.errorbar(x, y, errors, fmt=style, color=colour, markersize=4, label=word)
                for row in chosen:
                    ax.annotate(
                        f"n={row['n']}",
                        (row["height"], row["mean"]),
                        xytext=(5, 5 if is_right else -11),
                        textcoords="offset points",
                        fontsize=7,
                        color=colour,
                    )
            ax.set_ylim(0, 1.25 * most)  # the top fifth is for the words
            ax.set_xticks(sorted({row["height"] for row in rows}))
            ax.margins(x=0.15)
            ax.set_xlabel("height: hops down to the nearest leaf")
            lead = found["lead_probability"][k]
            title(ax, f"nodes {k} hop{'s' * (k > 1)} down, after {k} thought{'s' * (k > 1)}")
            say_lead(ax, found["reading"], lead, 0.94)
            grid(ax)
        axes[0].set_ylabel(f"mean value ({found['reading']} reading), ± 1 s.e.")
        axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        return png(figure)


ANALYSIS = Analysis(
    "value of nodes by their height, right and wrong ones apart", measure, table, picture
)
