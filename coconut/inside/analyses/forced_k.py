"""Accuracy and kinds of answers against the number of thoughts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from coconut.inside.lens import Lens
from coconut.text.answers import OUTCOMES, classify_chain, extract

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

# --- forced k


def forced_k(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy and outcome classes after exactly 0, 1, ... thoughts."""
    rows = []
    for k in range(lens.n_thoughts + 1):
        written = answers(lens, _questions(options.items), options, k)
        other = answers(lens, _questions(options.swapped), options, k)
        found = _accuracy(_right(written, options.items), _right(other, options.swapped))
        classes = [
            outcome(item, text, k) for item, text in zip(options.items, written, strict=True)
        ]
        found["outcomes"] = {name: classes.count(name) for name in OUTCOMES}
        found["with_chain"] = sum(extract(text)[1] != "" for text in written)
        rows.append({"thoughts": k, "is_trained": lens.is_trained(k), **found})
        advance(1)
    return {"rows": rows, "shortcut": _shortcut(options.items)}


def outcome(item: dict[str, Any], text: str, n_thoughts: int) -> str:
    """The class (section 5.1) of a text; a chain may begin wherever the thoughts may have led."""
    answer, chain = extract(text)
    return str(classify_chain(item, chain.split("\n"), answer, n_hidden=n_thoughts))


def _shortcut(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The no-name rule that goes farthest on these items, and its share."""
    from coconut.tasks.prosqa_stats import shortcut_accuracies

    found = shortcut_accuracies(items)
    # Rules that look at the asked name are the task itself, cut short.
    blind = {name: share for name, share in found.items() if "asked name" not in name}
    best = max(blind, key=lambda name: blind[name])
    return {"rule": best, "share": blind[best]}


def forced_k_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts."""
    columns = ["thoughts", "as asked %", "swapped %", "both %", *OUTCOMES]
    rows = [
        [
            row["thoughts"],
            *(_percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both")),
            *(row["outcomes"][name] for name in OUTCOMES),
        ]
        for row in found["rows"]
    ]
    return columns, rows
