"""Accuracy and kinds of answers against the number of thoughts."""

from collections.abc import Callable
from typing import Any

from coconut.inside.analyses.asking import SHARES, Analysis, Options, Table, asked, shares, shortcut
from coconut.inside.analyses.axes import ACCURACIES, grid, standard_error, title
from coconut.inside.lens import Lens
from coconut.reporting.drawing import INK, colours_of, figure_of, png
from coconut.text.answers import OUTCOMES, classify_chain, extract

OUTCOME_COLOURS = {
    "Correct Path": "#1a9e77",
    "Longer Path": "#86cdb2",
    "Correct Label": "#3b82c4",
    "Hallucination": "#999999",
    "Wrong Target": "#e07b00",
    "Incorrect Label": "#f2b36b",
}
"""What is right first, so that a bar's green and blue end at the accuracy."""


def measure(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy and outcome classes after exactly 0, 1, ... thoughts."""
    rows = []
    for k in range(lens.n_thoughts + 1):
        written, found = asked(lens, options, k)
        classes = [
            outcome(item, text, k) for item, text in zip(options.items, written, strict=True)
        ]
        found["outcomes"] = {name: classes.count(name) for name in OUTCOMES}
        found["with_chain"] = sum(extract(text)[1] != "" for text in written)
        rows.append({"thoughts": k, "is_trained": lens.is_trained(k), **found})
        advance(1)
    return {"rows": rows, "shortcut": shortcut(options.items)}


def outcome(item: dict[str, Any], text: str, n_thoughts: int) -> str:
    """The class (section 5.1) of a text; a chain may begin wherever the thoughts may have led."""
    answer, chain = extract(text)
    return str(classify_chain(item, chain.split("\n"), answer, n_hidden=n_thoughts))


def table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts."""
    columns = ["thoughts", *SHARES, *OUTCOMES]
    return columns, [
        [row["thoughts"], *shares(row), *(row["outcomes"][name] for name in OUTCOMES)]
        for row in found["rows"]
    ]


def picture(found: dict[str, Any]) -> bytes:
    """Accuracy, and what the answers are, against the number of thoughts."""
    rows = found["rows"]
    ks = [row["thoughts"] for row in rows]
    with figure_of(9, 3.6, 2, 2) as (figure, (left, right)):
        for (name, word), colour in zip(ACCURACIES, colours_of(3), strict=True):
            shares = [100 * row[name] / row["n"] for row in rows]
            errors = [standard_error(row[name], row["n"]) for row in rows]
            left.errorbar(ks, shares, errors, color=colour, marker="o", markersize=3.5, label=word)
        rule = 100 * found["shortcut"]["share"]
        said = f"best rule blind to the name, as asked: {rule:.0f} %"
        left.axhline(rule, color=INK, alpha=0.5, linestyle=":", linewidth=1, label=said)
        left.set_ylim(0, 104)
        left.set_xticks(ks)
        left.set_xlabel("thoughts before the answer (forced)")
        left.set_ylabel("% right, ± 1 s.e.")
        left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        title(left, "Right answers")
        grid(left)
        bottom = [0.0] * len(ks)
        for name, colour in OUTCOME_COLOURS.items():
            shares = [100 * row["outcomes"][name] / row["n"] for row in rows]
            if any(shares):
                right.bar(ks, shares, 0.75, bottom, color=colour, label=name)
                bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
        right.set_ylim(0, 100)
        right.set_xticks(ks)
        right.set_xlabel("thoughts before the answer (forced)")
        right.set_ylabel("% of questions, as asked")
        right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
        title(right, "What comes out")
        return png(figure)


ANALYSIS = Analysis(
    "accuracy and outcome classes after 0, 1, ... thoughts", measure, table, picture
)
