"""Time against length, batch and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {"length": "tokens a row", "batch": "rows a batch", "latents": "latents"}


def plot(points: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Write a row of small plots, one a quantity that was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(LABELS), figsize=(10, 3), sharey=True)
    for axis, (name, label) in zip(axes, LABELS.items(), strict=True):
        of_axis = [point for point in points if point["axis"] == name]
        x = [point[name] for point in of_axis]
        axis.plot(x, [p["seconds_a_question"] for p in of_axis], "o-", label="a question")
        axis.plot(x, [p["seconds_an_update"] for p in of_axis], "s-", label="an update")
        axis.set_xlabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.suptitle(f"GPT-2 small, {about['cores']} cores of {about['cpu']}, {about['commit']}")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
