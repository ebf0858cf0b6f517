"""`mlx-coconut report RUN [RUN ...]`: curves and results of runs, side by side.

Writes one HTML page that needs no network, and the same curves as a PNG beside it. A training run
has its own drawn by a child process at each evaluation (`Reporter`), so that neither the time nor
a failure of drawing reaches the run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jinja2

from coconut.config.keys import RunConfig
from coconut.errors import UserError, guarded, options_of
from coconut.files import write_text
from coconut.reporting.console import Console
from coconut.reporting.curves import RunHistory, read_history
from coconut.reporting.drawing import colours_of
from coconut.reporting.panels import drawings, panels_of, picture

PAGE = "report.html"
"""Name of the page in a run directory; the picture is its name with .png."""
REFRESH = 30
"""Seconds after which the page of a run that still trains reads itself again."""
LAST_WAIT = 60
"""Seconds that a finished run waits for its last drawing."""


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


def settings_title(runs: Sequence[RunHistory]) -> str:
    """What `settings` shows, in words."""
    return "settings that differ" if len(runs) > 1 else "settings other than default"


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


def rationales(runs: Sequence[RunHistory]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): of LaTRO, the best and the worst rationales that were logged last."""
    columns = ["advantage", "reward", "question", "rationale", "answer"]
    rows = [
        [run.label, *(_shown(row.get(name, "")) for name in columns)]
        for run in runs
        for row in run.rationales
    ]
    return ["run", *columns], rows


# --- the page ---

PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("coconut.reporting", "web"),
    undefined=jinja2.StrictUndefined,
    autoescape=True,
    trim_blocks=True,
)


def page(runs: Sequence[RunHistory], is_live: bool = False) -> str:
    """The HTML page: self-contained, light or dark as the reader's system is, narrow or wide."""
    columns, rows = results(runs)
    return PAGES.get_template("report.html").render(
        label=", ".join(run.label for run in runs),
        refresh=REFRESH if is_live else None,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S"),
        notes=[note for run in runs for note in run.notes],
        results=(columns, [[_shown(value) for value in row] for row in rows]),
        keys=colours_of(len(runs)) if len(runs) > 1 else [],
        drawings=drawings(runs),
        rationales=rationales(runs),
        settings_title=settings_title(runs).capitalize(),
        settings=settings(runs),
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
    write_text(out, content)
    if image is not None:
        write_text(out.with_suffix(".png"), image)
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


def main(argv: Sequence[str] | None = None, twin: str = "mlx_coconut") -> None:
    """The command line; see the head of this file."""
    parser = options_of(twin, "report", "Draw the curves of runs, side by side.")
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
        console.table(settings_title(runs), *settings(runs))
        console.say(f"wrote {out} and {out.with_suffix('.png').name}")

    guarded(run)


if __name__ == "__main__":
    main()
