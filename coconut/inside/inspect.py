"""`mlx-coconut inspect --model DIR --data FILE`: see inside a thought."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coconut.backend import MakeBackend
from coconut.batches.dataset import read_items
from coconut.checkpoints.named import add_model, too_low
from coconut.errors import UserError, guarded, options_of
from coconut.files import here_or_shipped, write_text
from coconut.inside.findings import READINGS, Inspection
from coconut.inside.graph import read_graph
from coconut.inside.lens import Lens
from coconut.inside.page.page import page
from coconut.inside.show import Tables


@dataclass(frozen=True)
class Asked:
    """A question to look at; idx: its number in its file, None if typed in; gold: its answer."""

    question: str
    gold: str | None = None
    idx: int | None = None


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Show what a checkpoint thinks about questions: as tables, JSON or a page."""
    parser = options_of(
        twin, "inspect", "See inside a thought: what a checkpoint thinks, thought by thought."
    )
    add_options(parser)
    parser.add_argument(
        "--reading", choices=list(READINGS), help="the tree that is shown first; else by method"
    )
    parser.add_argument(
        "--json", action="store_true", help="an object a question, everything in it"
    )
    parser.add_argument("--html", metavar="OUT", help="one page that opens from disk")
    options = parser.parse_args(argv)
    guarded(lambda: _inspect(twin, make_backend, options))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that looks into a checkpoint."""
    add_model(parser)
    add = parser.add_argument
    add("--data", metavar="FILE", type=here_or_shipped, help="JSON list of items; --idx chooses")
    add("--idx", type=int, nargs="+", metavar="N", help="items; else the first")
    add("--question", action="append", metavar="TEXT", help="may be repeated")
    add("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    add("--max-new-tokens", type=int, default=64, metavar="N")
    add("--top", type=int, default=10, metavar="N", help="tokens a read-out names")


def asked_questions(options: argparse.Namespace) -> list[Asked]:
    """The questions the options name. Raises UserError for options that do not go together."""
    problems = too_low(options, latents=0, max_new_tokens=1, top=1)
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


def _inspect(twin: str, make_backend: MakeBackend, options: argparse.Namespace) -> None:
    asked = asked_questions(options)
    if not asked:
        raise UserError("command line", "nothing to look at; give --data FILE or --question TEXT")
    if options.html is not None and Path(options.html).is_dir():
        raise UserError(f"--html {options.html}", "is a folder; name a file, such as page.html")
    lens = Lens(options.model, make_backend, options.latents, options.base)
    for one in asked:
        lens.check(one.question, options.max_new_tokens, read_graph(one.question))
    kind = options.reading or lens.own_reading
    tables, seen = Tables(), []
    for one in asked:
        found = look(lens, one, options)
        if options.html is not None:
            seen.append(found)
        if options.json:
            print(json.dumps(found.as_json(), ensure_ascii=False), flush=True)
        elif options.html is None:
            tables.show(found, kind)
    if options.html is not None:
        write_text(Path(options.html), page(lens, twin, seen, kind=kind))
        print(f"wrote {options.html}: open it in a browser", file=sys.stderr)
