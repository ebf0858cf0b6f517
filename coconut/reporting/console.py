"""What a run says: a line an event on the terminal, an object an event in log.jsonl.

mlx_coconut | gpt2 124.4M params | float32 | run prosqa-coconut | seed 0
epoch 07/50 stage 1 | step 0120/0559 | loss 0.4312 | 1,842 tok/s | 5.1 GB | eta 14m
eval  07/50 stage 1 | loss 0.4210 | answer 41.3% (124/300) | cot 12.7% (38/300)
saved runs/prosqa-coconut/epoch_07 | 475 MB
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from coconut.errors import UserError

if TYPE_CHECKING:
    from coconut.config.keys import RunConfig

LOG = "log.jsonl"
N_SHOWN = 5
"""Answers that an evaluation shows on the terminal; all are in predictions.jsonl."""
_stream: ContextVar[TextIO | None] = ContextVar("_stream", default=None)
"""Where a run speaks that was given no stream; None: stdout. Each thread has its own."""


@contextmanager
def silenced(is_so: bool = True) -> Iterator[None]:
    """Inside, in this thread, a Console that is given no stream prints nothing."""
    token = _stream.set(io.StringIO() if is_so else None)
    try:
        yield
    finally:
        _stream.reset(token)


class Console:
    """The one voice of a run; only rank 0 speaks.

    run_dir: where log.jsonl is appended to; None writes none. stream: where lines go, stdout
    unless given. wandb: keyword arguments of wandb.init, None for no tracker. Progress bars and
    colour appear on a terminal only (colour not with NO_COLOR). Use as a context manager, or close.
    Raises UserError if the log cannot be opened, or wandb is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        rank: int = 0,
        stream: TextIO | None = None,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_silent = rank != 0
        self._stream = stream or _stream.get() or sys.stdout
        self._rich = rich.console.Console(file=self._stream, highlight=False, markup=False)
        self._has_bars = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._log: Any = None
        self._wandb: Any = None
        if self._is_silent:
            return
        if wandb is not None:
            self._wandb = _start_wandb(wandb)
        if run_dir is not None:
            self._log, n_dropped = _open_log(Path(run_dir) / LOG)
            if n_dropped:
                self.event("log", message=f"dropped {n_dropped} bytes of an unfinished last line")

    def event(self, kind: str, **fields: Any) -> None:
        """Say one event: a line of the fields in the order given, and record it.

        `epoch`, `n_epochs` and `stage` lead the line; names of known units (bytes, seconds,
        tokens_per_second, ...) are written with them; a pair (count, total) is a share. None is
        left out of the line.
        """
        self.record(kind, **fields)
        self.say(_line(kind, fields))

    def record(self, kind: str, **fields: Any) -> None:
        """Write an event to the log and the tracker only.

        Numbers that are not finite become null in the log, listed under `_nonfinite`. Raises
        TypeError on a value JSON has no form for.
        """
        if self._is_silent:
            return
        nonfinite: dict[str, str] = {}
        record = {
            "event": kind,
            "time": round(time.time(), 3),
            **{name: _plain(name, value, nonfinite) for name, value in fields.items()},
        }
        if nonfinite:
            record["_nonfinite"] = nonfinite
        if self._log is not None:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            # One write a line, past any buffer: a kill loses at most the line being written.
            self._log.write(line.encode("utf-8", "backslashreplace"))
        if self._wandb is not None:
            self._wandb.log(_numbers(kind, record))

    def say(self, line: str) -> None:
        """A line for the reader alone, not logged."""
        if self._is_silent:
            return
        # A line stays one line, and printable: a message may quote a file with anything in it.
        line = line.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()
        if self._has_bars:
            # Through rich, so that the line lands above a running progress bar.
            head, separator, rest = line.partition(" | ")
            style = "" if self._rich.no_color else "bold"
            text = rich.text.Text.assemble((head, style), separator, rest)
            self._rich.print(text, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows under their columns, numbers to the right; ruled on a terminal, plain when piped."""
        cells = [[_cell(value) for value in row] for row in rows]
        is_number = [_are_numbers(column) for column in zip(*rows, strict=True)]
        is_number = is_number or [False] * len(columns)
        if self._has_bars and not self._is_silent:
            self._rich.print(self._ruled(title, columns, cells, is_number))
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

        def aligned(row: Sequence[str]) -> str:
            parts = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, is_number, strict=True)
            ]
            return "  ".join(parts).rstrip()

        self.say(title)
        for row in [list(columns), ["-" * width for width in widths], *cells]:
            self.say("  " + aligned(row))

    def _ruled(
        self,
        title: str,
        columns: Sequence[str],
        cells: Sequence[Sequence[str]],
        is_number: Sequence[bool],
    ) -> rich.table.Table:
        # NO_COLOR asks for no colour; without bold too, a captured terminal stays plain text.
        bold = "" if self._rich.no_color else "bold"
        table = rich.table.Table(
            title=rich.text.Text(title, style=bold),
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            header_style=bold,
        )
        for column, right in zip(columns, is_number, strict=True):
            justify: Literal["left", "right"] = "right" if right else "left"
            table.add_column(rich.text.Text(column), justify=justify, overflow="fold")
        for row in cells:
            table.add_row(*map(rich.text.Text, row))
        return table

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """A bar of `total` steps, to be advanced; nothing at all where there is no terminal."""
        if self._is_silent or not self._has_bars:
            yield Bar(None)
            return
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[values]}"),
        )
        with rich.progress.Progress(*columns, console=self._rich, transient=True) as progress:
            task = progress.add_task(title, total=total, values="")
            yield Bar(lambda n, values: progress.update(task, advance=n, values=values))

    def close(self) -> None:
        """Close the log and the tracker; the console still prints."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Bar:
    """A running progress bar, or the silence in its place."""

    def __init__(self, update: Callable[[int, str], None] | None) -> None:
        self._update = update

    def advance(self, n: int = 1, **values: Any) -> None:
        """Move on by n and show the latest values beside the bar."""
        if self._update is not None:
            self._update(n, " | ".join(_words(name, value) for name, value in values.items()))


def _open_log(path: Path) -> tuple[Any, int]:
    """The log opened for appending, and how many bytes of a torn last line were cut off."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
        file.seek(0)
        content = file.read()
        whole, torn = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        # The line is whole if only its newline is missing; otherwise the kill came while writing.
        if torn and _is_json(torn):
            file.write(b"\n")
            return file, 0
        file.truncate(len(whole))
        return file, len(torn)
    except OSError as error:
        raise UserError(str(path), f"cannot be written: {error.strerror}") from error


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _start_wandb(settings: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "wandb", "asked for but not installed: pip install wandb, or set wandb to false"
        ) from error
    return wandb.init(**settings)


def _plain(name: str, value: Any, nonfinite: dict[str, str]) -> Any:
    """The value as JSON has it; what is not finite becomes None and is noted under its name."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()  # a numpy scalar
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if _is_share(value):
        return {"n": value[0], "of": value[1], "share": value[0] / value[1] if value[1] else None}
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", inner, nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}.{i}", inner, nonfinite) for i, inner in enumerate(value)]
    raise TypeError(f"{name}: no JSON form for {type(value).__name__}")


def _numbers(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker plots: the numbers of an event, a share as its share."""
    found = {}
    for name, value in record.items():
        value = value.get("share") if isinstance(value, dict) else value
        if isinstance(value, int | float) and name != "time":
            found[f"{kind}/{name}"] = value
    return found


def _line(kind: str, fields: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if value is not None}
    # "epoch" and "eval " stand in one column; the events of a start need no word before them.
    head = {"train": "epoch", "eval": "eval ", "start": ""}.get(kind, kind)
    if "epoch" in rest:
        head += " " + _of(rest.pop("epoch"), rest.pop("n_epochs", None))
        if "stage" in rest:
            head += f" stage {rest.pop('stage')}"
    elif "path" in rest:
        head += f" {rest.pop('path')}"
    parts = [head] if head else []
    if "step" in rest:
        parts.append(f"step {_of(rest.pop('step'), rest.pop('n_steps', None), width=4)}")
    if "model" in rest:
        n_params = rest.pop("n_params", None)
        size = "" if n_params is None else f" {_count(n_params)} params"
        parts.append(f"{rest.pop('model')}{size}")
        parts = [*map(str, filter(None, [rest.pop("backend", None)])), *parts]
    return " | ".join(parts + [_words(name, value) for name, value in rest.items()])


def _of(number: int, total: int | None, width: int = 2) -> str:
    width = max(width, len(str(total or "")))
    return f"{number:0{width}d}" + ("" if total is None else f"/{total:0{width}d}")


def _words(name: str, value: Any) -> str:
    """One field as it stands in a line."""
    if _is_share(value):
        n, total = value
        return f"{name} {100 * n / total:.1f}% ({n}/{total})" if total else f"{name} - (0/0)"
    if name in _BARE:
        return str(value)
    if name in _UNITS and isinstance(value, int | float) and math.isfinite(value):
        return _UNITS[name](value)
    return f"{name.replace('_', ' ')} {_cell(value)}"


def _cell(value: Any) -> str:
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Small numbers, such as a learning rate, would all read 0.0000.
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _are_numbers(column: Sequence[Any]) -> bool:
    """Numbers, written out or not; a cell may be empty."""
    said = [value for value in column if value not in ("", "–")]
    return bool(said) and all(
        isinstance(value, int | float) or bool(_NUMBER.fullmatch(str(value))) for value in said
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value)


def _count(number: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes = seconds // 60
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


_UNITS: dict[str, Callable[[Any], str]] = {
    "bytes": _bytes,
    "memory_bytes": _bytes,
    "peak_memory_bytes": lambda value: f"peak {_bytes(value)}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "samples_per_second": lambda value: f"{value:,.1f} samples/s",
    "seconds": lambda value: f"{value:.1f} s" if value < 60 else _duration(value),
    "eta_seconds": lambda value: f"eta {_duration(value)}",
    "n_params": lambda value: f"{_count(value)} params",
}
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?%?")
# Values that say themselves what they are.
_BARE = ("message", "backend", "device", "dtype")


def tracker(config: RunConfig) -> dict[str, Any] | None:
    """Arguments of wandb.init; a debug run is not tracked."""
    if config.debug:
        return None
    return {"project": config.project, "name": config.name, "config": dataclasses.asdict(config)}
