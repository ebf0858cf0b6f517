"""Accuracy on deeper, denser and larger graphs than the model was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coconut.errors import UserError
from coconut.inside.analyses.asking import SHARES, Analysis, Options, Table, asked, shares, shortcut
from coconut.inside.analyses.axes import ACCURACIES, grid, standard_error, title
from coconut.inside.lens import Lens
from coconut.reporting.drawing import INK, colours_of, figure_of, png
from coconut.tasks import prosqa, prosqa_graph
from coconut.tasks.words import CONCEPTS


def measure(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy on graphs that differ from the data's in one way each."""
    exclude = {key for item in options.items for key in prosqa.keys(item)}
    n, rows = len(options.items), []
    for number, (name, about, changes) in enumerate(_shifts(options.items)):
        items = options.items
        if changes is not None:
            shifted = prosqa_graph.Options(**changes)
            items = list(prosqa.generate(shifted, options.seed + number, n, exclude=exclude))
        longest = max((item["question"] for item in items), key=len)
        try:
            lens.check(longest, options.max_new_tokens)
        except UserError as error:
            rows.append({"set": name, "about": about, "left_out": error.problems[0]})
            advance(1)
            continue
        swapped = [prosqa.swap(item) for item in items]
        _, counts = asked(lens, replace(options, items=items, swapped=swapped), lens.n_thoughts)
        sizes = {
            "nodes": float(np.mean([len(item["idx_to_symbol"]) for item in items])),
            "edges": float(np.mean([len(item["edges"]) for item in items])),
            "hops": float(np.mean([len(item["steps"]) for item in items])),
        }
        found = {**counts, **sizes, "shortcut": shortcut(items)}
        rows.append({"set": name, "about": about, **found})
        advance(1)
    return {"rows": rows}


def _shifts(items: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(name, what differs, generator's options): one change each from the data's own size."""
    nodes = max(len(item["idx_to_symbol"]) for item in items)
    hops = [len(item["steps"]) for item in items]
    low, high = min(hops), max(hops)
    # Questions that long are at most one in twenty of the data's own.
    deep = next(h for h in range(low, high + 2) if sum(x >= h for x in hops) <= len(hops) / 20)
    base = {"nodes": nodes, "min_hops": low, "max_hops": max(high, 6)}
    shifts: list[tuple[str, str, dict[str, Any] | None]] = [
        ("the data", "as given", None),
        ("fresh", "the same size, generated anew", base),
        ("more hops", f"{deep} or more", base | {"min_hops": deep, "max_hops": deep + 3}),
        ("denser", "one parent more for each node", base | {"more_parents": 1}),
        ("equal depth", "both concepts equally deep", base | {"equal_depth": True}),
    ]
    for more in (4, 8, nodes):
        if nodes + more <= len(CONCEPTS) + 2:  # there are no words for more
            about = f"{nodes + more} raw nodes for {nodes}"
            shifts.append((f"{nodes + more} nodes", about, base | {"nodes": nodes + more}))
    return shifts


def table(found: dict[str, Any]) -> Table:
    """A row a set."""
    columns = ["set", "nodes", "edges", "hops", *SHARES, "best blind rule %"]
    rows = []
    for row in found["rows"]:
        if "left_out" in row:
            rows.append([row["set"], *["–"] * 6, row["left_out"]])
            continue
        sizes = [f"{row[name]:.1f}" for name in ("nodes", "edges", "hops")]
        rows.append([row["set"], *sizes, *shares(row), f"{100 * row['shortcut']['share']:.1f}"])
    return columns, rows


def picture(found: dict[str, Any]) -> bytes:
    """Accuracy on each set, with what the best rule blind to the asked name gets."""
    rows = [row for row in found["rows"] if "left_out" not in row]
    with figure_of(max(6.0, 1.1 * len(rows)), 3.8, 1, 1) as (figure, [ax]):
        for offset, (name, word), colour in zip(
            (-0.26, 0.0, 0.26), ACCURACIES, colours_of(3), strict=True
        ):
            at = [i + offset for i in range(len(rows))]
            shares = [100 * row[name] / row["n"] for row in rows]
            errors = [standard_error(row[name], row["n"]) for row in rows]
            bars = {"elinewidth": 0.8, "alpha": 0.7}
            ax.bar(at, shares, 0.25, color=colour, yerr=errors, error_kw=bars, label=word)
        for i, row in enumerate(rows):
            share = 100 * row["shortcut"]["share"]
            label = "best rule blind to the name, as asked" if i == 0 else "_"
            ax.plot([i - 0.42, i + 0.42], [share] * 2, ":", color=INK, linewidth=1.2, label=label)
        names = [f"{row['set']}\n{row['hops']:.1f} hops" for row in rows]
        ax.set_xticks(range(len(rows)), names, fontsize=8)
        ax.set_ylim(0, 108)
        ax.set_ylabel("% right, ± 1 s.e.")
        ax.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
        title(ax, "Right answers on sets that are unlike the data in one way", pad=24)
        grid(ax)
        return png(figure)


ANALYSIS = Analysis("accuracy on deeper, denser, larger graphs", measure, table, picture)
