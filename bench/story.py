"""`python -m bench.story OUT.png`: README's picture, a question answered after 0, 1, ... thoughts.

Asks the shipped model about one item through `inspect --json` and draws what that prints.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_coconut.__main__ import main as mlx_coconut

DATA, ITEM = Path(__file__).parents[1] / "data" / "prosqa_made_test.json", 4
N_PANELS = 5
INK, QUIET, FAINT = "#1d2733", "#5c6875", "#b9c2cc"
GOOD, BAD, THOUGHT = "#00695c", "#b3402a", "#1f5fb0"


def inspected() -> dict[str, Any]:
    """What `inspect` finds in the item."""
    asks = ["inspect", "--model", "prosqa", "--data", str(DATA), "--idx", str(ITEM), "--json"]
    with redirect_stdout(io.StringIO()) as printed:
        mlx_coconut(asks)
    return json.loads(printed.getvalue())


def places(graph: dict[str, Any]) -> dict[int, tuple[float, int]]:
    """Node -> its place: a row a hop from its name, the asked name's concepts on the left."""
    rows: dict[int, int] = {n: d for n, d in enumerate(graph["distances"]) if d is not None}
    ours = set(rows)
    rows |= {name: 0 for name in graph["names"] if name not in rows}
    for _ in graph["nodes"]:
        for parent, child in graph["edges"]:
            if child not in ours and parent in rows:
                rows[child] = min(rows.get(child, len(rows)), rows[parent] + 1)
    found: dict[int, tuple[float, int]] = {}
    width = max(sum(rows[n] == row for n in ours) for row in rows.values())
    for is_ours in (True, False):
        for row in range(max(rows.values()) + 1):
            here = [n for n in rows if rows[n] == row and (n in ours) == is_ours]
            # Below the middle of those that lead to it, so that few lines cross.
            above = {
                n: [found[p][0] for p, c in graph["edges"] if c == n and p in found] for n in here
            }
            here.sort(key=lambda n: sum(above[n]) / max(len(above[n]), 1))
            left = (width - len(here)) / 2 if is_ours else width + 0.3 - (len(here) - 1) / 2
            found |= {node: (left + i, row) for i, node in enumerate(here)}
    return found


def draw_graph(axis: Any, found: dict[str, Any], at: dict[int, tuple[float, int]], k: int) -> None:
    """The question's graph with the probability that each concept has in thought k."""
    graph = found["graph"]
    (values,) = (r["values"] for r in found["readings"] if r["kind"] == "thought")
    right, wrong = sorted(graph["choices"], key=lambda node: node != graph["right"])
    for parent, child in graph["edges"]:
        (x0, y0), (x1, y1) = at[parent], at[child]
        style = {"arrowstyle": "->", "color": FAINT, "lw": 0.6, "mutation_scale": 5}
        style |= {"shrinkA": 3, "shrinkB": 3}
        if y0 == y1:
            style["connectionstyle"] = "arc3,rad=0.25"
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=style, zorder=1)
    for node, (x, y) in at.items():
        ring = GOOD if node == right else BAD if node == wrong else FAINT
        axis.scatter(x, y, s=18, color="white", edgecolor=ring, linewidth=0.9, zorder=2)
        if values[k][node] > 0.01:
            axis.scatter(x, y, s=520 * values[k][node], color=THOUGHT, linewidth=0, zorder=3)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    bold = {"fontsize": 7.5, "weight": "bold", "ha": "center", "bbox": behind, "zorder": 4}
    for node, colour, dy in ((graph["asked"], INK, 6), (right, GOOD, -6), (wrong, BAD, -6)):
        axis.annotate(
            graph["nodes"][node], at[node], (0, dy), textcoords="offset points",
            color=colour, va="bottom" if dy > 0 else "top", **bold,
        )  # fmt: skip
    axis.scatter(*at[graph["asked"]], s=22, color=INK, zorder=4)
    xs, ys = zip(*at.values(), strict=True)
    axis.set_xlim(min(xs) - 0.6, max(xs) + 0.8)
    axis.set_ylim(max(ys) + 0.3, min(ys) - 0.5)
    axis.axis("off")


def draw(found: dict[str, Any], out: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    graph, at = found["graph"], places(found["graph"])
    path = [graph["nodes"][n] for n in graph["path"]]
    *statements, asks = (text.strip() for text in found["segments"][: found["n_sentences"]])
    figure, axes = plt.subplots(1, N_PANELS, figsize=(8.6, 4.7))
    figure.subplots_adjust(left=0.07, right=0.995, top=0.765, bottom=0.225, wspace=0.06)

    def write(x: float, y: float, text: str, size: float, colour: str = INK, **more: Any) -> None:
        figure.text(x, y, text, fontsize=size, color=colour, va="center", **more)

    way = [f"{path[0]} is a {path[1]}."]
    way += [f"Every {a} is a {b}." for a, b in pairwise(path[1:])]
    write(0.01, 0.955, asks, 14, weight="bold")
    write(0.01, 0.895, f"Asked behind {len(statements)} statements: … {' … '.join(way)} …", 9)
    for k, (axis, stop) in enumerate(zip(axes, found["stops"], strict=False)):
        draw_graph(axis, found, at, k)
        middle = (axis.get_position().x0 + axis.get_position().x1) / 2
        head = "no thought" if k == 0 else f"{k} thought{'s' * (k > 1)}"
        colour, mark = (GOOD, "✓") if stop["is_correct"] else (BAD, "✗")
        sure = f"{stop['certainty']:.0%}".replace("%", " %")
        write(middle, 0.81, head, 11, weight="bold", ha="center")
        write(middle, 0.20, f"“{stop['answer']}”", 8.5, colour, ha="center")
        write(middle, 0.125, f"{mark} {sure}", 18, colour, weight="bold", ha="center")
    for row in range(1, max(row for _, row in at.values()) + 1):
        y = figure.transFigure.inverted().transform(axes[0].transData.transform((0, row)))[1]
        write(0.01, y, f"{row} step{'s' * (row > 1)}", 7.5, QUIET)
    below = f"Dots: the concepts, in rows by their steps from {path[0]}. Arrows: the statements. "
    below += (
        "Blue: what the latest thought holds. Below: the answer, and how sure the model is of it."
    )
    write(0.01, 0.035, below, 7, QUIET)
    figure.savefig(out, dpi=200, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(inspected(), Path(sys.argv[1]))
