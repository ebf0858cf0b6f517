"""Accuracy with other thoughts in the place of the model's own."""

from collections.abc import Callable
from typing import Any

import numpy as np

from coconut.config.methods import WITH_FEEDBACK
from coconut.errors import UserError
from coconut.inside.analyses.asking import (
    SHARES,
    Analysis,
    Options,
    Table,
    asked,
    percent,
    shares,
    shortcut,
    thoughts_of,
)
from coconut.inside.analyses.axes import ACCURACIES, grid, title
from coconut.inside.lens import Lens
from coconut.reporting.drawing import figure_of, png
from coconut.text.answers import extract

NOISES = (0.5, 1.0, 2.0)
"""Standard deviations of added noise, in rms of the thoughts themselves."""


def measure(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy with thoughts put in the place of the model's own; all else is computed as usual."""
    if not lens.n_thoughts or lens.config.method not in WITH_FEEDBACK:
        raise UserError(str(lens.directory), "its latents receive no thoughts: nothing to replace")
    sides = [[item["question"] for item in side] for side in (options.items, options.swapped)]
    own = [thoughts_of(lens, side, options) for side in sides]
    rows = []
    for name, about, change in _changes(own, options.seed):
        given = [change(side) for side in range(2)]
        n = 0 if given[0] is None else lens.n_thoughts
        written, found = asked(lens, options, n, given)
        # The concept that the other name's question has for an answer.
        found["other"] = sum(
            extract(text)[0].rsplit(" ", 1)[-1] == other["answer"].rsplit(" ", 1)[-1]
            for text, other in zip(written, options.swapped, strict=True)
        )
        rows.append({"thoughts": name, "about": about, **found})
        advance(1)
    return {"n_thoughts": lens.n_thoughts, "rows": rows, "shortcut": shortcut(options.items)}


Change = Callable[[int], "np.ndarray | None"]


def _changes(own: list[np.ndarray], seed: int) -> list[tuple[str, str, Change]]:
    """(name, what it is, side -> thoughts (N, R, D)); side 0 as asked, 1 swapped.

    A change takes the same draws on both sides.
    """
    n, R, D = own[0].shape
    mean = [x.mean(axis=0, keepdims=True) for x in own]
    scale = [np.sqrt((x.astype(np.float64) ** 2).mean(axis=(0, 2), keepdims=True)) for x in own]
    # Another question: one step around a shuffled circle, so nobody is their own neighbour.
    circle = np.random.default_rng([seed, 0]).permutation(n)
    neighbour = np.empty(n, int)
    neighbour[circle] = np.roll(circle, 1)
    draws = np.random.default_rng([seed, 1])
    normal = draws.standard_normal((n, R, D))
    order = np.array([_derangement(R, draws) for _ in range(n)])

    def f32(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    places = np.arange(R)[:, None]
    return [
        ("own", "the model's own, put back: the control", lambda s: own[s]),
        ("none", "no latents at all", lambda s: None),
        ("zero", "zeros", lambda s: np.zeros_like(own[s])),
        ("mean", "the mean over all questions", lambda s: f32(np.repeat(mean[s], n, axis=0))),
        ("random", "random, at the thoughts' scale", lambda s: f32(normal * scale[s])),
        *(
            (
                f"noise {x:g}",
                f"its own plus noise of {x:g} times their scale",
                lambda s, x=x: f32(own[s] + x * normal * scale[s]),
            )
            for x in NOISES
        ),
        ("shuffled", "its own in another order", lambda s: own[s][np.arange(n)[:, None], order]),
        ("another's", "of another question", lambda s: own[s][neighbour]),
        ("other name's", "of the same graph, the other name asked", lambda s: own[1 - s]),
        *(
            (
                f"mean at {i + 1}",
                f"only thought {i + 1} is the mean",
                lambda s, i=i: np.where(places == i, mean[s], own[s]),
            )
            for i in range(R)
        ),
    ]


def _derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random order that leaves nothing in its place (of one thing, itself)."""
    while True:
        order = rng.permutation(n)
        if n < 2 or (order != np.arange(n)).all():
            return order


def table(found: dict[str, Any]) -> Table:
    """A row a kind of thoughts."""
    columns = ["thoughts", *SHARES, "other name's answer %", "what they are"]
    return columns, [
        [row["thoughts"], *shares(row), percent(row["other"], row["n"]), row["about"]]
        for row in found["rows"]
    ]


def picture(found: dict[str, Any]) -> bytes:
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
        ax.set_yticks(places, [row["about"] for row in rows], fontsize=8)
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.set_xlim(0, 106)
        ax.set_xlabel(f"% of {rows[0]['n']} questions")
        ax.legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
        title(ax, "Answers with other thoughts in the place of the model's own", pad=24)
        grid(ax, "x")
        return png(figure)


ANALYSIS = Analysis(
    "accuracy with zeroed, noisy, shuffled and other questions' thoughts", measure, table, picture
)
