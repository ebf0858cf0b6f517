"""The panels of a report: which figures share a picture, and drawing them."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coconut.reporting.curves import Curve, RunHistory
from coconut.reporting.drawing import INK, colours_of, figure_of, png

POINTS = 250
"""A longer curve is drawn as the means of this many equal stretches, with their range behind."""
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One picture: which curves share its axes, and in which unit."""

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    """(curve, its word in the legend)."""
    is_share: bool = False
    is_log: bool = False


PANELS = (
    Panel(
        "Loss",
        "nats a label",
        (("train/loss", "training"), ("eval/loss", "validation")),
        is_log=True,
    ),
    Panel(
        "Right answers",
        "% of the validation questions",
        (
            ("eval/answer", "as asked"),
            ("eval/eval/zero_shot_acc", "held out"),
            ("eval/swapped", "swapped"),
            ("eval/both", "both"),
            ("eval/cot", "chain"),
        ),
        is_share=True,
    ),
    Panel(
        "Reward",
        "nats an answer",
        (
            ("train/objective/reward", "sampled"),
            ("eval/objective/eval_reward", "held out"),
            ("eval/eval/reward_shuffled", "another's rationale"),
            ("eval/eval/reward_empty", "none"),
        ),
    ),
    Panel("KL to the reference", "nats a rationale", (("train/objective/kl", "training"),)),
    Panel(
        "Finished rationales",
        "%",
        (("train/val/perc_finished_thoughts", "sampled"), ("eval/eval/finished", "held out")),
        is_share=True,
    ),
    Panel(
        "Length of a rationale",
        "tokens",
        (
            ("train/val/avg_rationale_length", "sampled"),
            ("train/length/ended_mean", "ended"),
            ("train/length/least", "shortest"),
            ("train/length/most", "longest"),
        ),
    ),
    Panel(
        "Spread of the reward",
        "standard deviation",
        (
            ("train/reward/std_within", "within prompts"),
            ("train/reward/std_between", "between prompts"),
        ),
    ),
    Panel(
        "Prompts whose rationales agree",
        "%",
        (("train/reward/all_right", "all right"), ("train/reward/all_wrong", "all wrong")),
        is_share=True,
    ),
    Panel(
        "Length against reward",
        "correlation",
        (("train/length/reward_correlation", "training"),),
    ),
    Panel("Clipped ratios", "%", (("train/objective/clip_fraction", "training"),), is_share=True),
    Panel("Entropy of the policy", "nats a token", (("train/objective/entropy", "training"),)),
    Panel("Speed of training", "tokens a second", (("train/tokens_per_second", "training"),)),
    Panel("Gradient norm", "before clipping", (("train/grad_norm", "training"),), is_log=True),
)
"""What every run logs. Further numbers of the log's events get a panel by their name."""
THOUGHTS = {
    "thoughts/scale": ("Scale of a thought", "rms over that of an embedding"),
    "thoughts/step_cosine": ("A thought and the one before", "cosine"),
    "thoughts/nearest_cosine": ("A thought and the nearest embedding", "cosine"),
    "thoughts/lens_entropy": ("Entropy of the next token before a latent", "nats"),
    "thoughts/effective_rank": ("Effective rank of a thought", "over the questions of a batch"),
}
"""(title, unit) of what each evaluation measures of the thoughts, a line a latent."""
NO_PANEL = (
    *("train/lr", "eval/new_tokens", "eval/samples_per_second", "eval/n", "train/episode"),
    # LaTRO's under their published names, said by other panels already or constant.
    *("train/eps", "train/objective/kl_penalty", "train/objective/rlhf_reward"),
    *("train/objective/advantage_avg", "train/loss/policy_avg", "train/loss/sft_avg"),
    *("train/val/num_stop_tokens", "train/objective/reward_per_token"),
    *("train/objective/kl_per_token", "train/objective/on_policy_gap", "train/rollout_seconds"),
    *("train/samples_per_second", "train/objective/zero_variance_groups"),
    *("train/objective/group_std", "train/reward/likelihood", "train/length/tokens_cut"),
    *("train/length/ended_least", "train/length/ended_most"),
)


def panels_of(runs: Sequence[RunHistory]) -> list[Panel]:
    """The panels that these runs have something for; unknown quantities come last, by name."""
    names = {name for run in runs for name in run.curves}
    known = {name for panel in PANELS for name, _ in panel.series}
    others: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name in sorted(names - known - set(NO_PANEL), key=_natural):
        event, _, path = name.partition("/")
        title, _, part = path.partition(".")
        word = " ".join(filter(None, [{"eval": "validation"}.get(event, ""), part]))
        plain = (title.replace("_", " ").capitalize(), "")
        key = THOUGHTS.get(f"{event}/{title}", plain)
        others.setdefault(key, []).append((name, word or "value"))
    found = [Panel(title, unit, tuple(series)) for (title, unit), series in others.items()]
    shown = [
        replace(panel, series=tuple(pair for pair in panel.series if pair[0] in names))
        for panel in (*PANELS, *found)
    ]
    return [panel for panel in shown if panel.series]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts thought 10 behind thought 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


# --- drawing ---


def picture(runs: Sequence[RunHistory]) -> bytes:
    """All panels as one PNG on white."""
    panels = panels_of(runs)
    columns = min(2, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    with figure_of(5.2 * columns, 3.3 * rows, len(panels), columns) as (figure, axes):
        for ax, panel in zip(axes, panels, strict=True):
            # A line of its own above the legend: with five words there they would meet.
            pad = 20 if len(panel.series) > 1 else 6
            ax.set_title(panel.title, loc="left", fontweight="bold", pad=pad)
            _draw(ax, panel, runs)
        if len(runs) > 1:
            for run, colour in zip(runs, colours_of(len(runs)), strict=True):
                axes[0].plot([], [], color=colour, label=run.label)
            handles = axes[0].get_lines()[-len(runs) :]
            figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(runs)))
        return png(figure, 110)


def drawings(runs: Sequence[RunHistory]) -> list[tuple[Panel, str]]:
    """Each panel as an SVG element that takes the page's text colour."""
    found = []
    for panel in panels_of(runs):
        file = io.StringIO()
        with figure_of(5.2, 3.0, 1, 1) as (figure, [ax]):
            _draw(ax, panel, runs)
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue().replace(INK, "currentColor")
        found.append((panel, svg[svg.index("<svg") :]))
    return found


def _draw(ax: Any, panel: Panel, runs: Sequence[RunHistory]) -> None:
    is_single, factor = len(runs) == 1, 100 if panel.is_share else 1
    colours = colours_of(len(panel.series) if is_single else len(runs))
    low, high = float("inf"), float("-inf")
    for r, run in enumerate(runs):
        for s, (name, word) in enumerate(panel.series):
            if name not in run.curves:
                continue
            colour = colours[s if is_single else r]
            x, *ys = _thinned(run.curves[name])
            mean, least, most = (factor * y for y in ys)
            marker = "o" if not name.startswith("train/") and len(x) <= 40 else ""
            dash = "-" if is_single else DASHES[s % len(DASHES)]
            # In a comparison the word is the dash's, said once.
            label = word if r == 0 or is_single else "_"
            ax.plot(x, mean, dash, color=colour, marker=marker, markersize=3, label=label, zorder=3)
            if is_single and len(run.curves[name].x) > POINTS:
                ax.fill_between(x, least, most, color=colour, alpha=0.18, linewidth=0)
            low, high = min(low, mean.min()), max(high, mean.max())
    if panel.is_share:
        ax.set_ylim(0, 103)
    elif panel.is_log and low > 0 and high > 30 * low:
        ax.set_yscale("log")
    elif low >= 0:
        ax.set_ylim(0, 1.08 * high or 1)
    ends = [curve.x[-1] for run in runs for curve in run.curves.values()]
    starts = [curve.x[0] for run in runs for curve in run.curves.values()]
    ax.set_xlim(math.floor(min(starts)), max(ends) + 0.01 * (max(ends) - min(starts)))
    ax.set_xlabel(" or ".join(sorted({run.unit for run in runs})))
    ax.set_ylabel(panel.unit)
    ax.grid(color=INK, alpha=0.12, linewidth=0.6)
    _mark_stages(ax, runs)
    if len(panel.series) > 1:
        # On the line of the title: inside it would lie on curves sooner or later.
        legend = ax.legend(
            fontsize=8,
            ncols=min(6, len(panel.series)),
            loc="lower right",
            bbox_to_anchor=(1, 1),
            columnspacing=1,
        )
        for line in legend.get_lines() if not is_single else []:
            line.set_color(INK)


def _mark_stages(ax: Any, runs: Sequence[RunHistory]) -> None:
    """A line where a stage begins, if all runs drawn here changed stage together."""
    stages = runs[0].stages
    if len(stages) < 2 or any(run.stages != stages for run in runs):
        return
    for number, (epoch, stage) in enumerate(stages):
        if number:
            ax.axvline(epoch, color=INK, alpha=0.35, linewidth=0.7, linestyle=(0, (2, 2)))
        text = f"stage {stage}" if number == 0 else str(stage)
        ax.annotate(
            text,
            (epoch, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -7),
            textcoords="offset points",
            fontsize=7,
            alpha=0.7,
        )


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, least, most) of at most POINTS equal stretches of a curve."""
    x, y = np.array(curve.x), np.array(curve.y)
    if len(x) <= POINTS:
        return x, y, y, y
    edges = len(x) * np.arange(POINTS + 1) // POINTS
    starts = edges[:-1]
    mean = np.add.reduceat(y, starts) / np.diff(edges)
    return x[edges[1:] - 1], mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
