"""The look of our pictures: one matplotlib style, opened only where something is drawn."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coconut.errors import UserError

INK = "#010203"
"""Text and axes; written nowhere else, so that a page can put its own colour, light or dark."""
COLOURS = ("#3b82c4", "#e07b00", "#1a9e77", "#cc5fa0", "#7f6fd0", "#4fb3d9", "#a5673f", "#888888")
"""Told apart by most eyes, on white and on black."""


def colours_of(n: int) -> list[str]:
    """n colours, again from the first if there are more than eight."""
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


@contextmanager
def figure_of(width: float, height: float, n: int, columns: int) -> Iterator[tuple[Any, list[Any]]]:
    """A matplotlib figure in inches with n axes, in our style."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "matplotlib",
            f"cannot be imported ({error}), so nothing is drawn: pip install matplotlib",
        ) from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "coconut",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.4,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        rows = math.ceil(n / columns)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[n:]:
            spare.remove()
        yield figure, axes[:n]


def png(figure: Any, dpi: int = 130) -> bytes:
    """A figure on white as a file's bytes, the same for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()
