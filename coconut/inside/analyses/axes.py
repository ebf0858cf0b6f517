"""What the pictures of the analyses have in common."""

import math
from typing import Any

from coconut.reporting.drawing import INK

ACCURACIES = (("as_asked", "as asked"), ("swapped", "swapped"), ("both", "both"))
"""Name in a row of numbers -> as a picture and a table say it."""


def standard_error(count: int, n: int) -> float:
    """Standard error of a share, in per cent; of 0 and of all as of half a question."""
    p = min(max(count, 0.5), n - 0.5) / n
    return 100 * math.sqrt(p * (1 - p) / n)


def title(ax: Any, text: str, pad: float = 6) -> None:
    """Over the axes, to the left; pad: points between."""
    ax.set_title(text, loc="left", fontweight="bold", fontsize=10, pad=pad)


def say_lead(ax: Any, reading: str, share: float, y: float = 1.025) -> None:
    """How probable the lead is. y: on the title's line, unless no curve passes further down."""
    word = "all concepts together" if reading == "thought" else "P(lead)"
    where = {"xycoords": "axes fraction", "ha": "right", "fontsize": 8}
    ax.annotate(f"{word}: {share:.2f}", (1, y), **where)


def grid(ax: Any, axis: str = "y") -> None:
    """Faint lines behind what is drawn."""
    ax.grid(axis=axis, color=INK, alpha=0.12, linewidth=0.6)
    ax.set_axisbelow(True)
