"""What thoughts hold of a question's graph side by side: the best 1, 2, 3 candidates."""

from collections.abc import Callable
from typing import Any

import numpy as np

from coconut.inside.analyses.asking import Analysis, Options, Table
from coconut.inside.analyses.axes import grid, say_lead, title
from coconut.inside.analyses.trees import DRAWN, about_reading, read_trees
from coconut.inside.lens import Lens
from coconut.reporting.drawing import colours_of, figure_of, png

N_TREE = 3
"""Candidates whose value is added up."""


def measure(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the best 1, 2, 3 candidates after each number of thoughts, question by question."""
    trees = read_trees(lens, options, advance)
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
    return {**about_reading(lens, options, trees), "rows": rows}


def table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts: mean values."""
    tops = [f"top {n + 1}" for n in range(N_TREE)]
    columns = ["thoughts", "lead", *tops, "below the name", "at k hops", "uniform"]
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


def picture(found: dict[str, Any]) -> bytes:
    """Values of the best 1, 2, 3 nodes after the first and second thought, and none as control."""
    shown = [row for row in found["rows"] if row["percentiles"]]
    with figure_of(3.4 * len(shown), 3.6, len(shown), len(shown)) as (figure, axes):
        for ax, row in zip(axes, shown, strict=True):
            curves = row["percentiles"]
            below: list[float] | None = None
            for number, (curve, colour) in enumerate(zip(curves, colours_of(3), strict=False), 1):
                x = [100 * i / max(len(curve) - 1, 1) for i in range(len(curve))]
                ax.plot(x, curve, color=colour, label=f"top {number}")
                ax.fill_between(x, below or [0.0] * len(x), curve, color=colour, alpha=0.15, lw=0)
                below = curve
            lead = found["lead_probability"][row["thoughts"]]
            words = {0: "no thought (control)", 1: "after thought 1", 2: "after thought 2"}
            title(ax, words[row["thoughts"]])
            say_lead(ax, found["reading"], lead)
            ax.set_ylim(0, 1.02)
            ax.set_xlabel("percentile of questions")
            grid(ax)
        axes[0].set_ylabel(f"cumulative value ({found['reading']} reading)")
        axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
        return png(figure)


ANALYSIS = Analysis("value of the best 1, 2, 3 nodes after each thought", measure, table, picture)
