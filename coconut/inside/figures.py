"""The pictures of the analyses, drawn from what their JSON files hold."""

from __future__ import annotations

import io
import math
from typing import Any

from coconut.reporting.drawing import INK, colours_of, figure_of

DPI = 130
ACCURACIES = (("as_asked", "as asked"), ("swapped", "swapped"), ("both", "both"))
OUTCOME_COLOURS = {
    "Correct Path": "#1a9e77",
    "Longer Path": "#86cdb2",
    "Correct Label": "#3b82c4",
    "Hallucination": "#999999",
    "Wrong Target": "#e07b00",
    "Incorrect Label": "#f2b36b",
}
"""What is right first, so that a bar's green and blue end at the accuracy."""


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _error(count: int, n: int) -> float:
    """Standard error of a share, in per cent; of 0 and of all as of half a question."""
    p = min(max(count, 0.5), n - 0.5) / n
    return 100 * math.sqrt(p * (1 - p) / n)


def _title(ax: Any, text: str, pad: float = 6) -> None:
    ax.set_title(text, loc="left", fontweight="bold", fontsize=10, pad=pad)


def _say_lead(ax: Any, reading: str, share: float, y: float = 1.025) -> None:
    """y: on the line of the title unless there is room inside, where curves might pass."""
    word = "all concepts together" if reading == "thought" else "P(lead)"
    where = {"xycoords": "axes fraction", "ha": "right", "fontsize": 8}
    ax.annotate(f"{word}: {share:.2f}", (1, y), **where)


def _grid(ax: Any, axis: str = "y") -> None:
    ax.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.6)
    ax.set_axisbelow(True)


def forced_k(found: dict[str, Any]) -> bytes:
    """Accuracy, and what the answers are, against the number of thoughts."""
    rows = found["rows"]
    ks = [row["thoughts"] for row in rows]
    with figure_of(9, 3.6, 2, 2) as (figure, (left, right)):
        for (name, word), colour in zip(ACCURACIES, colours_of(3), strict=True):
            shares = [100 * row[name] / row["n"] for row in rows]
            errors = [_error(row[name], row["n"]) for row in rows]
            left.errorbar(ks, shares, errors, color=colour, marker="o", markersize=3.5, label=word)
        rule = 100 * found["shortcut"]["share"]
        said = f"best rule blind to the name, as asked: {rule:.0f} %"
        left.axhline(rule, color=INK, alpha=0.5, linestyle=":", linewidth=1, label=said)
        left.set_ylim(0, 104)
        left.set_xticks(ks)
        left.set_xlabel("thoughts before the answer (forced)")
        left.set_ylabel("% right, ± 1 s.e.")
        left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        _title(left, "Right answers")
        _grid(left)
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
        _title(right, "What comes out")
        return _png(figure)


def parallelism(found: dict[str, Any]) -> bytes:
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
            _title(ax, words[row["thoughts"]])
            _say_lead(ax, found["reading"], lead)
            ax.set_ylim(0, 1.02)
            ax.set_xlabel("percentile of questions")
            _grid(ax)
        axes[0].set_ylabel(f"cumulative value ({found['reading']} reading)")
        axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
        return _png(figure)


def height(found: dict[str, Any]) -> bytes:
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
            _title(ax, f"nodes {k} hop{'s' * (k > 1)} down, after {k} thought{'s' * (k > 1)}")
            _say_lead(ax, found["reading"], lead, 0.94)
            _grid(ax)
        axes[0].set_ylabel(f"mean value ({found['reading']} reading), ± 1 s.e.")
        axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        return _png(figure)


def ablate(found: dict[str, Any]) -> bytes:
    """Both right, and the answer of the other name, for each kind of thoughts."""
    rows = found["rows"]
    places = list(range(len(rows)))[::-1]
    with figure_of(8, 0.38 * len(rows) + 1.3, 1, 1) as (figure, [ax]):
        for offset, (name, word), colour in (
            (0.27, ACCURACIES[0], "#3b82c4"),
            (0.0, ACCURACIES[2], "#1a9e77"),
            (-0.27, ("other", "the other name's answer"), "#e07b00"),
        ):
            shares = [100 * row[name] / row["n"] for row in rows]
            at = [place + offset for place in places]
            ax.barh(at, shares, 0.25, color=colour, label=word)
            for y, share in zip(at, shares, strict=True):
                ax.annotate(f"{share:.0f}", (share + 0.6, y), va="center", fontsize=7)
        labels = [f"{row['about']}" for row in rows]
        ax.set_yticks(places, labels, fontsize=8)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlim(0, 106)
        ax.set_xlabel(f"% of {rows[0]['n']} questions")
        ax.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
        _title(ax, "Answers with other thoughts in the place of the model's own", pad=24)
        _grid(ax, "x")
        return _png(figure)


def ood(found: dict[str, Any]) -> bytes:
    """Accuracy on each set, with what the best rule blind to the asked name gets."""
    rows = [row for row in found["rows"] if "left_out" not in row]
    with figure_of(max(6.0, 1.1 * len(rows)), 3.8, 1, 1) as (figure, [ax]):
        for offset, (name, word), colour in zip(
            (-0.26, 0.0, 0.26), ACCURACIES, colours_of(3), strict=True
        ):
            at = [i + offset for i in range(len(rows))]
            shares = [100 * row[name] / row["n"] for row in rows]
            errors = [_error(row[name], row["n"]) for row in rows]
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
        _title(ax, "Right answers on sets that are unlike the data in one way", pad=24)
        _grid(ax)
        return _png(figure)
