"""`python -m TWIN.inspect --model DIR --data FILE`: see inside a thought."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.cli import guarded
from coconut.dataset import read_items
from coconut.errors import UserError
from coconut.lens import READINGS, Inspection, Lens

if TYPE_CHECKING:
    from coconut.runner import MakeBackend


@dataclass(frozen=True)
class Asked:
    """A question to look at; idx: its number in its file, None if typed in; gold: its answer."""

    question: str
    gold: str | None = None
    idx: int | None = None


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Show what a checkpoint thinks about questions: as tables, JSON or a page."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {twin}.inspect",
        description="See inside a thought: what a checkpoint thinks, thought by thought.",
    )
    add_options(parser)
    parser.add_argument(
        "--reading", choices=list(READINGS), help="the tree that the tables show; else by method"
    )
    parser.add_argument(
        "--json", action="store_true", help="an object a question, everything in it"
    )
    parser.add_argument("--html", metavar="OUT", help="one page that opens from disk")
    options = parser.parse_args(argv)
    guarded(lambda: _inspect(twin, make_backend, options))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that looks into a checkpoint."""
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--data", metavar="FILE", help="JSON list of items; --idx chooses")
    parser.add_argument("--idx", type=int, nargs="+", metavar="N", help="items; else the first")
    parser.add_argument("--question", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="tokens a read-out names")


def asked_questions(options: argparse.Namespace) -> list[Asked]:
    """The questions the options name. Raises UserError for options that do not go together."""
    problems = [
        f"--{name}: must be at least {low}, got {value}"
        for name, value, low in (
            ("latents", options.latents, 0),
            ("max-new-tokens", options.max_new_tokens, 1),
            ("top", options.top, 1),
        )
        if value is not None and value < low
    ]
    if options.idx is not None and options.data is None:
        problems.append("--idx: chooses items of a file; give --data FILE too")
    if problems:
        raise UserError("command line", *problems)
    asked = [Asked(question) for question in options.question or []]
    if options.data is not None:
        items = read_items(options.data)
        for idx in options.idx if options.idx is not None else [0]:
            if not 0 <= idx < len(items):
                raise UserError(options.data, f"has no item {idx}, only 0 to {len(items) - 1}")
            asked.append(Asked(items[idx]["question"], items[idx]["answer"], idx))
    return asked


def look(lens: Lens, asked: Asked, options: argparse.Namespace) -> Inspection:
    """One question looked at, with the options' numbers."""
    return lens.inspect(
        asked.question,
        asked.gold,
        asked.idx,
        n_top=options.top,
        max_new_tokens=options.max_new_tokens,
    )


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(str(path), f"cannot be written: {error.strerror}") from error


def _inspect(twin: str, make_backend: MakeBackend, options: argparse.Namespace) -> None:
    asked = asked_questions(options)
    if not asked:
        raise UserError("command line", "nothing to look at; give --data FILE or --question TEXT")
    lens = Lens(Path(options.model), make_backend, options.latents)
    for one in asked:
        lens.check(one.question, options.max_new_tokens)
    if options.html:
        from coconut.page import page

        text = page(lens, twin, [look(lens, one, options) for one in asked])
        _write(Path(options.html), text)
        print(f"wrote {options.html}: open it in a browser", file=sys.stderr)
    if options.json:
        for one in asked:
            found = look(lens, one, options).as_json()
            print(json.dumps(found, ensure_ascii=False), flush=True)
        return
    if options.html:
        return
    from coconut.show import Tables

    tables = Tables()
    for one in asked:
        tables.show(look(lens, one, options), options.reading or lens.own_reading)
