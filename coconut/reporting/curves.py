"""What a run wrote, read back as curves: log.jsonl, config.yaml, summary.json."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from coconut.config.values import parse_yaml
from coconut.errors import UserError
from coconut.reporting.log import LOG

Position = tuple[float, float, int]
"""(epoch, step in it, place in EVENTS); an evaluation stands behind every step of its epoch."""

EVENTS = ("train", "eval", "thoughts")
"""What is drawn, in the order in which the log has them at one place."""

NOT_CURVES = (
    *("time", "epoch", "epochs", "n_epochs", "stage", "step", "n_steps", "eta_seconds"),
    *("peak_memory_bytes", "active_memory_bytes", "cached_memory_bytes"),
)
"""Numbers of an event that say where it stands, or that belong to the machine alone."""


@dataclass
class Curve:
    """One logged quantity over the run; values as logged (shares from 0 to 1).

    x: epochs, or updates where the log counts nothing else.
    """

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


@dataclass
class RunHistory:
    """A run directory as read: curves by `event/field`, settings, last results, what was wrong."""

    directory: Path
    label: str
    curves: dict[str, Curve]
    stages: list[tuple[float, int]]
    """(epoch it began, stage), one entry a change."""
    settings: dict[str, Any]
    summary: dict[str, Any]
    n_updates: int
    n_epochs: int | None
    notes: list[str]
    unit: str
    """What x counts: epoch or update."""
    rationales: list[dict[str, Any]]
    """Of LaTRO: the best and the worst that were logged last."""

    def last(self, name: str) -> float | None:
        """Latest value of a curve, None if it was never logged."""
        return self.curves[name].y[-1] if name in self.curves else None

    def best(self, name: str) -> tuple[float, float] | None:
        """(highest value, epoch it was reached) of a curve."""
        if name not in self.curves:
            return None
        curve = self.curves[name]
        at = max(range(len(curve.y)), key=curve.y.__getitem__)
        return curve.y[at], curve.x[at]


def read_history(directory: Path | str) -> RunHistory:
    """The history of a run directory.

    A damaged line of the log is left out and counted in `notes`. Where a resumed run went back
    over steps, the later ones count. Raises UserError if there is no log to read.
    """
    directory = Path(directory)
    events, rationales, notes = _read_log(directory / LOG)
    kept = _without_repeats(events)
    curves: dict[str, Curve] = {}
    stages: list[tuple[float, int]] = []
    for _, event in kept:
        x = _epochs_done(event)
        for name, value in _numbers(event).items():
            curve = curves.setdefault(f"{event['event']}/{name}", Curve())
            curve.x.append(x)
            curve.y.append(value)
        stage = event.get("stage")
        if event["event"] == "train" and isinstance(stage, int) and "epoch" in event:
            if not stages or stages[-1][1] != stage:
                stages.append((event["epoch"] - 1, stage))
    n_epochs = [event["n_epochs"] for _, event in kept if _is_number(event.get("n_epochs"))]
    return RunHistory(
        directory=directory,
        label=directory.resolve().name,
        curves=curves,
        stages=stages,
        settings=_read_file(directory / "config.yaml", parse_yaml, "the settings", notes),
        summary=_read_file(directory / "summary.json", json.loads, "its results", notes),
        n_updates=sum(event["event"] == "train" for _, event in kept),
        n_epochs=n_epochs[-1] if n_epochs else None,
        notes=notes,
        unit="epoch" if all("epoch" in event for _, event in kept) else "update",
        rationales=rationales,
    )


def _read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """(events that have a place in training, the last rationales, notes on damaged lines)."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(str(path), "no such file; give the directory of a run") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from error
    events, damaged, notes = [], [], []
    rationales: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError
        except (ValueError, RecursionError):
            damaged.append(number)
            continue
        # LaTRO counts updates alone.
        has_place = _is_number(event.get("epoch")) or _is_number(event.get("step"))
        if event["event"] in EVENTS and has_place:
            events.append(event)
        elif event["event"] == "rationales":
            rationales = [row for row in event.get("rows") or [] if isinstance(row, dict)]
    if damaged:
        are = "line is" if len(damaged) == 1 else "lines are"
        notes = [f"{path}: {len(damaged)} {are} damaged and left out (the first is {damaged[0]})"]
    return events, rationales, notes


def _without_repeats(events: list[dict[str, Any]]) -> list[tuple[Position, dict[str, Any]]]:
    """Events in order; one that stands before others, after a resume, replaces all from there."""
    kept: list[tuple[Position, dict[str, Any]]] = []
    for event in events:
        step, kind = event.get("step"), EVENTS.index(event["event"])
        if _is_number(event.get("epoch")):
            at = (float(event["epoch"]), float(step) if _is_number(step) else float("inf"), kind)
        else:
            at = (0.0, float(event["step"]), kind)
        while kept and kept[-1][0] >= at:
            kept.pop()
        kept.append((at, event))
    return kept


def _epochs_done(event: dict[str, Any]) -> float:
    step, n_steps = event.get("step"), event.get("n_steps")
    if not _is_number(event.get("epoch")):
        return float(event["step"])
    if _is_number(step) and _is_number(n_steps) and n_steps:
        return event["epoch"] - 1 + step / n_steps
    return float(event["epoch"])


def _numbers(event: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of an event; of a share its share, of a list or group each by its name."""
    found: dict[str, float] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict) and "share" in value:
            visit(name, value["share"])
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for i, inner in enumerate(value, start=1):
                visit(f"{name}.{i}", inner)
        elif _is_number(value):
            found[name] = float(value)

    for name, value in event.items():
        if name not in NOT_CURVES and not name.startswith("_"):
            visit(name, value)
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    # JSON as Python reads it may hold NaN and Infinity, which no axis can show.
    return type(value) in (int, float) and abs(value) < float("inf")


def _read_file(
    path: Path, parse: Callable[[str], Any], lost: str, notes: list[str]
) -> dict[str, Any]:
    """A file of names and values; empty without it, or with a note if it is damaged."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        notes.append(f"{path}: cannot be read; {lost} are not shown")
        return {}
    return found if isinstance(found, dict) else {}
