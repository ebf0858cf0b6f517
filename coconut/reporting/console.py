"""What a run says: a line an event on the terminal, an object an event in log.jsonl.

mlx_coconut | gpt2 124.4M params | float32 | run prosqa-coconut | seed 0
epoch 07/50 stage 1 | step 0120/0559 | loss 0.4312 | 1,842 tok/s | 5.1 GB | eta 14m
eval  07/50 stage 1 | loss 0.4210 | answer 41.3% (124/300) | cot 12.7% (38/300)
saved runs/prosqa-coconut/epoch_07 | 475 MB
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TextIO

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from coconut.config.keys import RunConfig
from coconut.reporting.log import LOG, append, open_log, plain
from coconut.reporting.trackers import numbers_of, open_tracker
from coconut.reporting.wording import are_numbers, cell, in_words, line_of

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
    unless given. tracked: the run whose numbers go to the tracker that it names. Progress bars and
    colour appear on a terminal only (colour not with NO_COLOR). Use as a context manager, or close.
    Raises UserError if the log cannot be opened, or the tracker is not installed.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        rank: int = 0,
        stream: TextIO | None = None,
        tracked: RunConfig | None = None,
    ) -> None:
        self._is_silent = rank != 0
        self._stream = stream or _stream.get() or sys.stdout
        self._rich = rich.console.Console(file=self._stream, highlight=False, markup=False)
        self._has_bars = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._log: Any = None
        self._tracker: Any = None
        if self._is_silent:
            return
        if tracked is not None:
            self._tracker = open_tracker(tracked)
        if run_dir is not None:
            self._log, n_dropped = open_log(Path(run_dir) / LOG)
            if n_dropped:
                self.event("log", message=f"dropped {n_dropped} bytes of an unfinished last line")

    def event(self, kind: str, **fields: Any) -> None:
        """Say one event: a line of the fields in the order given, and record it.

        `epoch`, `n_epochs` and `stage` lead the line; names of known units (bytes, seconds,
        tokens_per_second, ...) are written with them; a pair (count, total) is a share. None is
        left out of the line.
        """
        self.record(kind, **fields)
        self.say(line_of(kind, fields))

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
            **{name: plain(name, value, nonfinite) for name, value in fields.items()},
        }
        if nonfinite:
            record["_nonfinite"] = nonfinite
        if self._log is not None:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            # One write a line, past any buffer: a kill loses at most the line being written.
            append(self._log, line.encode("utf-8", "backslashreplace"))
        if self._tracker is not None:
            self._tracker.log(numbers_of(kind, record))

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
        cells = [[cell(value) for value in row] for row in rows]
        is_number = [are_numbers(column) for column in zip(*rows, strict=True)]
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
        head = rich.text.Text(title, style=bold)
        look = {"box": rich.box.SIMPLE_HEAD, "pad_edge": False, "header_style": bold}
        return ruled(columns, cells, is_number, title=head, title_justify="left", **look)

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
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def ruled(
    columns: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool], **look: Any
) -> rich.table.Table:
    """A table for a terminal that cuts no cell, numbers to the right; look: of rich.table.Table."""
    table = rich.table.Table(**look)
    for column, right in zip(columns, is_number, strict=True):
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(rich.text.Text(column), justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*map(rich.text.Text, row))
    return table


class Bar:
    """A running progress bar, or the silence in its place."""

    def __init__(self, update: Callable[[int, str], None] | None) -> None:
        self._update = update

    def advance(self, n: int = 1, **values: Any) -> None:
        """Move on by n and show the latest values beside the bar."""
        if self._update is not None:
            self._update(n, " | ".join(in_words(name, value) for name, value in values.items()))
