"""`python -m bench.latro_plot RUN_DIR ... OUT.png`: reward, KL and accuracy of LaTRO runs."""

from __future__ import annotations

import sys
from pathlib import Path

from coconut.run.latro.loop import read_curve

CURVES = {
    "reward, nats": ("train", "objective/reward"),
    "KL to the reference, nats": ("train", "objective/kl"),
    "held-out accuracy": ("eval", "eval/zero_shot_acc"),
}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    *runs, out = sys.argv[1:]
    figure, axes = plt.subplots(1, len(CURVES), figsize=(11, 3))
    for run in map(Path, runs):
        for axis, (event, field) in zip(axes, CURVES.values(), strict=True):
            points = read_curve(run, event)
            axis.plot([p["step"] for p in points], [p[field] for p in points], label=run.name)
    for axis, title in zip(axes, CURVES, strict=True):
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
