"""`python -m coconut.reporting.report RUN [RUN ...]`: curves and results of runs, side by side.

Writes one HTML page that needs no network, and the same curves as a PNG beside it. A training run
has its own drawn by a child process at each evaluation (`Reporter`), so that neither the time nor
a failure of drawing reaches the run.
"""

from __future__ import annotations

import argparse
import html
import io
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from coconut.checkpoints.checkpoint import write_text
from coconut.config.reading import RunConfig
from coconut.errors import UserError, guarded
from coconut.reporting.console import Console
from coconut.reporting.curves import Curve, RunHistory, read_history
from coconut.reporting.drawing import INK, colours_of, figure_of

PAGE = "report.html"
"""Name of the page in a run directory; the picture is its name with .png."""
REFRESH = 30
"""Seconds after which the page of a run that still trains reads itself again."""
LAST_WAIT = 60
"""Seconds that a finished run waits for its last drawing."""
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
    Panel("Length of a rationale", "tokens", (("train/val/avg_rationale_length", "sampled"),)),
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
    "train/objective/group_std",
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
    shown = []
    for panel in (*PANELS, *found):
        series = tuple((n, word) for n, word in panel.series if n in names)
        if series:
            shown.append(Panel(panel.title, panel.unit, series, panel.is_share, panel.is_log))
    return shown


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts thought 10 behind thought 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]


# --- drawing ---


def picture(runs: Sequence[RunHistory]) -> bytes:
    """All panels as one PNG on white."""
    panels = panels_of(runs)
    columns = min(2, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    file = io.BytesIO()
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
        figure.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()


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
            x, mean, least, most = _thinned(run.curves[name])
            mean, least, most = ([factor * y for y in ys] for ys in (mean, least, most))
            marker = "o" if not name.startswith("train/") and len(x) <= 40 else ""
            dash = "-" if is_single else DASHES[s % len(DASHES)]
            # In a comparison the word is the dash's, said once.
            label = word if r == 0 or is_single else "_"
            ax.plot(x, mean, dash, color=colour, marker=marker, markersize=3, label=label, zorder=3)
            if is_single and len(run.curves[name].x) > POINTS:
                ax.fill_between(x, least, most, color=colour, alpha=0.18, linewidth=0)
            low, high = min(low, *mean), max(high, *mean)
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


def _thinned(curve: Curve) -> tuple[list[float], list[float], list[float], list[float]]:
    """(x, mean, least, most) of at most POINTS equal stretches of a curve."""
    n = len(curve.x)
    if n <= POINTS:
        return curve.x, curve.y, curve.y, curve.y
    edges = [n * i // POINTS for i in range(POINTS + 1)]
    parts = [(curve.x[a:b], curve.y[a:b]) for a, b in pairwise(edges)]
    return (
        [x[-1] for x, _ in parts],
        [sum(y) / len(y) for _, y in parts],
        [min(y) for _, y in parts],
        [max(y) for _, y in parts],
    )


# --- tables ---


def results(runs: Sequence[RunHistory]) -> tuple[list[str], list[list[Any]]]:
    """(columns, a row a run): where it stands, its last losses and accuracies, its best."""
    columns: dict[str, Callable[[RunHistory], Any]] = {
        "run": lambda run: run.label,
        "method": lambda run: run.settings.get("method") or run.summary.get("method"),
        "epoch": lambda run: _epoch(run) if run.unit == "epoch" else None,
        "updates": lambda run: run.n_updates or None,
        "loss": lambda run: run.last("train/loss"),
        "val. loss": lambda run: run.last("eval/loss"),
        "asked %": lambda run: _percent(run.last("eval/answer"), run, "accuracy"),
        "swapped %": lambda run: _percent(run.last("eval/swapped"), run, "swapped_accuracy"),
        "both %": lambda run: _percent(run.last("eval/both"), run, "both_accuracy"),
        "reward": lambda run: run.last("eval/objective/eval_reward"),
        "best %": lambda run: _best(run),
        "questions": lambda run: run.summary.get("n"),
        "twin": lambda run: str(run.summary.get("backend", "")).removesuffix("_coconut") or None,
    }
    rows = [[value(run) for value in columns.values()] for run in runs]
    keep = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    names = list(columns)
    return [names[i] for i in keep], [
        ["" if row[i] is None else row[i] for i in keep] for row in rows
    ]


def _epoch(run: RunHistory) -> str | None:
    last = max((curve.x[-1] for curve in run.curves.values()), default=None)
    if last is None:
        return None
    return f"{last:.4g}" + (f" of {run.n_epochs}" if run.n_epochs else "")


def _percent(share: float | None, run: RunHistory, name: str) -> str | None:
    value: Any = run.summary.get(name) if share is None else share
    return f"{100 * value:.1f}" if isinstance(value, int | float) else None


def _best(run: RunHistory) -> str | None:
    for name, word in (
        ("eval/both", "both"),
        ("eval/answer", "as asked"),
        ("eval/eval/zero_shot_acc", "held out"),
    ):
        best = run.best(name)
        if best is not None:
            return f"{100 * best[0]:.1f} {word}, {run.unit} {best[1]:.0f}"
    return None


def settings(runs: Sequence[RunHistory]) -> tuple[list[str], list[list[str]]]:
    """(columns, a row a key): what differs between the runs, or from the defaults for one run."""
    found = [_flat(run.settings) for run in runs]
    if len(runs) == 1:
        columns, compared = ["key", "value", "default"], [*found, _flat(vars(RunConfig()))]
    else:
        columns, compared = ["key", *(run.label for run in runs)], found
    ignored = {"name", "save_path", "project", "coconut", "cot", "no_cot", "no_thoughts"}
    names = dict.fromkeys(name for one in found for name in one)
    rows = [
        [name, *(one.get(name, "–") for one in compared)] for name in names if name not in ignored
    ]
    return columns, [row for row in rows if len(set(row[1:])) > 1]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):  # of an empty one nothing: its keys are the other runs'
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


# --- the page ---

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024; --faint: #6b7280;
  --line: #d8dce2; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e8ea; --faint: #9aa3ad; --line: #333a42; --card: #1b1f24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .15rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0; } .faint { color: var(--faint); } .warn { color: #c2410c; }
.panels { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; padding: .75rem .75rem .25rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
.wrap td { max-width: 26rem; white-space: normal; overflow-wrap: anywhere; }
.wrap td:first-child { white-space: nowrap; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }
"""


def page(runs: Sequence[RunHistory], is_live: bool = False) -> str:
    """The HTML page: self-contained, light or dark as the reader's system is, narrow or wide."""
    label = ", ".join(run.label for run in runs)
    colours = colours_of(len(runs))
    keys = [
        f'<span class="key" style="background:{c}"></span>' if len(runs) > 1 else ""
        for c in colours
    ]
    figures = [
        f'<figure role="img" aria-label="{html.escape(panel.title)}"><figcaption>'
        f"{html.escape(panel.title)}</figcaption>{svg}</figure>"
        for panel, svg in drawings(runs)
    ]
    columns, rows = results(runs)
    differing = settings(runs)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="refresh" content="{REFRESH}">' if is_live else "",
        f"<title>{html.escape(label)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(label)}</h1>",
        f'<p class="faint">drawn {time.strftime("%Y-%m-%d %H:%M:%S")}'
        f"{f', still running; read again every {REFRESH} s' if is_live else ''}</p>",
        *(f'<p class="warn">{html.escape(note)}</p>' for run in runs for note in run.notes),
        "<h2>Results</h2>",
        _table(columns, [[_shown(value) for value in row] for row in rows], keys),
        f'<div class="panels">{"".join(figures)}</div>'
        if figures
        else "<p>The log holds no training yet.</p>",
        f"<h2>{'Settings that differ' if len(runs) > 1 else 'Settings other than default'}</h2>",
        _table(*differing) if differing[1] else "<p>None.</p>",
        "</body></html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], keys: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for i, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        cells[0] = (keys[i] if keys else "") + cells[0]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    kind = "scroll" if keys else "scroll wrap"
    return (
        f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(directories: Sequence[Path | str], out: Path, is_live: bool = False) -> list[str]:
    """Write the page to `out` and the picture beside it; returns notes on what was damaged.

    Raises UserError if a directory holds no log, or the files cannot be written.
    """
    runs = _read_all(directories)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(str(out), "the page needs a name that ends in .html")
    content = page(runs, is_live)
    image = picture(runs) if panels_of(runs) else None
    try:
        write_text(out, content)
        if image is not None:
            write_text(out.with_suffix(".png"), image)
    except OSError as error:
        raise UserError(str(out), f"cannot be written: {error.strerror}") from error
    return [note for run in runs for note in run.notes]


def _read_all(directories: Sequence[Path | str]) -> list[RunHistory]:
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(read_history(directory))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("report", *problems)
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = str(run.directory)
    return runs


# --- beside a run ---


class Reporter:
    """Draws a run's curves in a child process of the lowest priority, one drawing at a time.

    Starting one costs the run 0.4 to 8 ms (measured on a busy core); the drawing itself a second of
    a core that nobody else wants, and of the run's own only at its end.

    say: told, once, in one line, why there are no curves; then nothing more is tried.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir, self._say = run_dir.resolve(), say
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._has_failed = False

    def draw(self, is_live: bool = True) -> None:
        """Start a drawing and return at once; nothing if the last one is still at work."""
        if self._child is not None and self._child.poll() is None:
            return
        self._collect()
        if self._has_failed:
            return
        command = [sys.executable, "-m", "coconut.reporting.report", str(self._run_dir), "--quiet"]
        try:
            # A file, not a pipe: nobody reads while the child writes.
            with ExitStack() as stack:
                self._errors = stack.enter_context(tempfile.TemporaryFile())
                self._child = subprocess.Popen(
                    [*command, "--live"] if is_live else command,
                    cwd=Path(__file__).parents[2],
                    # Ctrl-C stops the run; the drawing it has begun may end.
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                )
                stack.pop_all()
        except OSError as error:
            self._fail(f"no curves, drawing cannot be started: {error.strerror}")

    def finish(self) -> None:
        """Draw once more, and wait for it."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()  # what it draws is out of date
            self._child.wait()
            self._child = None
            self._errors.close()
        self.draw(is_live=False)
        if self._child is None:
            return
        try:
            self._child.wait(LAST_WAIT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            self._fail(f"no curves, drawing took more than {LAST_WAIT} s")
        self._collect()

    def _collect(self) -> None:
        """Read how the last drawing ended."""
        if self._child is None:
            return
        status, self._child = self._child.returncode, None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        if status:
            self._fail(lines[-1] if lines else f"no curves, drawing ended with status {status}")

    def _fail(self, line: str) -> None:
        if not self._has_failed:
            self._say(line if line.startswith("report: ") else f"report: {line}")
        self._has_failed = True


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m coconut.reporting.report",
        description="Draw the curves of runs, side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory (save_path/name)")
    parser.add_argument(
        "--out", metavar="FILE", help=f"the page; RUN/{PAGE} for one run, else ./{PAGE}"
    )
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    default = Path(options.runs[0]) / PAGE if len(options.runs) == 1 else Path(PAGE)
    out = Path(options.out) if options.out else default

    def run() -> None:
        if options.live and hasattr(os, "nice"):
            os.nice(19)
        for note in write_report(options.runs, out, options.live):
            print(note, file=sys.stderr)
        if options.quiet:
            return
        runs = _read_all(options.runs)
        console = Console()
        console.table("results", *results(runs))
        title = "settings that differ" if len(runs) > 1 else "settings other than default"
        console.table(title, *settings(runs))
        console.say(f"wrote {out} and {out.with_suffix('.png').name}")

    guarded(run)


if __name__ == "__main__":
    main()
