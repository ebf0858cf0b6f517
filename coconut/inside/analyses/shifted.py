"""Accuracy on deeper, denser and larger graphs than the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.errors import UserError
from coconut.inside.lens import Lens
from coconut.tasks.words import CONCEPTS

if TYPE_CHECKING:
    pass
from coconut.inside.analyses.asking import (
    Options,
    Table,
    _accuracy,
    _percent,
    _questions,
    _right,
    answers,
)
from coconut.inside.analyses.forced_k import _shortcut
from coconut.tasks import prosqa_graph

# --- out of distribution


def ood(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy on graphs that differ from the data's in one way each."""
    from coconut.tasks import prosqa

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
        hits = [
            _right(answers(lens, _questions(side), options, lens.n_thoughts), side)
            for side in (items, swapped)
        ]
        sizes = {
            "nodes": float(np.mean([len(item["idx_to_symbol"]) for item in items])),
            "edges": float(np.mean([len(item["edges"]) for item in items])),
            "hops": float(np.mean([len(item["steps"]) for item in items])),
        }
        found = {**_accuracy(*hits), **sizes, "shortcut": _shortcut(items)}
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
        if nodes + more <= _most_nodes():
            about = f"{nodes + more} raw nodes for {nodes}"
            shifts.append((f"{nodes + more} nodes", about, base | {"nodes": nodes + more}))
    return shifts


def _most_nodes() -> int:
    """The most nodes there are words for."""

    return len(CONCEPTS) + 2


def ood_table(found: dict[str, Any]) -> Table:
    """A row a set."""
    columns = [
        "set",
        "nodes",
        "edges",
        "hops",
        "as asked %",
        "swapped %",
        "both %",
        "best blind rule %",
    ]
    rows = []
    for row in found["rows"]:
        if "left_out" in row:
            rows.append([row["set"], *["–"] * 6, row["left_out"]])
            continue
        sizes = [f"{row[name]:.1f}" for name in ("nodes", "edges", "hops")]
        shares = [_percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both")]
        rows.append([row["set"], *sizes, *shares, f"{100 * row['shortcut']['share']:.1f}"])
    return columns, rows
