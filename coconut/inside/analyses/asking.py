"""What all analyses share: options, questions, thoughts, answers and their table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coconut.batches.batch import by_length, collate
from coconut.batches.decoding import Decoding
from coconut.inside.lens import Lens
from coconut.tasks.prosqa_stats import shortcut_accuracies
from coconut.text.answers import exact_match, extract

SEED = 20_241
"""Of the generated sets; no training run of this project has it."""

Table = tuple[list[str], list[list[Any]]]
SHARES = ("as asked %", "swapped %", "both %")
"""Columns of `shares`."""


@dataclass(frozen=True)
class Options:
    """What an analysis is run on, beside the model."""

    items: list[dict[str, Any]]
    swapped: list[dict[str, Any]]
    """The same items asking for the other name."""
    batch_size: int
    max_new_tokens: int
    reading: str
    seed: int


@dataclass(frozen=True)
class Analysis:
    """One command: what it measures, its table, its picture."""

    help: str
    measure: Callable[[Lens, Options, Callable[[int], None]], dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    draw: Callable[[dict[str, Any]], bytes]


def answers(
    lens: Lens,
    questions: Sequence[str],
    options: Options,
    n_thoughts: int,
    thoughts: np.ndarray | None = None,
) -> list[str]:
    """What the model writes for each question after n_thoughts.

    thoughts (N, n_thoughts, D): to feed back instead of its own.
    """
    tokenizer = lens.tokenizer
    decoding = Decoding(options.max_new_tokens, tokenizer.eos_id, stops=tokenizer.ended)
    written = [""] * len(questions)
    for numbers, batch in _batches(lens, questions, options.batch_size, n_thoughts):
        given = None if thoughts is None else np.ascontiguousarray(thoughts[numbers].swapaxes(0, 1))
        for i, new in zip(numbers, lens.backend.generate(batch, decoding, given), strict=True):
            written[i] = lens.tokenizer.decode(new)
    return written


def thoughts_of(lens: Lens, questions: Sequence[str], options: Options) -> np.ndarray:
    """The model's own thoughts about each question: (N, R, D)."""
    found: list[np.ndarray] = [np.empty(0)] * len(questions)
    for numbers, batch in _batches(lens, questions, options.batch_size, lens.n_thoughts):
        for i, own in zip(numbers, lens.backend.thoughts(batch).swapaxes(0, 1), strict=True):
            found[i] = own
    return np.stack(found)


def _batches(lens: Lens, questions: Sequence[str], size: int, n_thoughts: int) -> Any:
    """(numbers, Batch) of questions of like length."""
    rows = [lens.prompt(question, n_thoughts) for question in questions]
    for numbers in by_length([len(row.ids) for row in rows], size):
        yield numbers, collate([rows[i] for i in numbers], lens.tokenizer.pad_id)


def asked(
    lens: Lens,
    options: Options,
    n_thoughts: int,
    thoughts: Sequence[np.ndarray | None] = (None, None),
) -> tuple[list[str], dict[str, Any]]:
    """(what is written as asked, counts of questions right as asked, swapped and both).

    thoughts: as for `answers`, of the questions as asked and swapped.
    """
    written, right = [], []
    for items, given in zip((options.items, options.swapped), thoughts, strict=True):
        questions = [item["question"] for item in items]
        written.append(answers(lens, questions, options, n_thoughts, given))
        pairs = zip(written[-1], items, strict=True)
        right.append([exact_match(extract(text)[0], item["answer"]) for text, item in pairs])
    both = sum(a and b for a, b in zip(*right, strict=True))
    counts = {"as_asked": sum(right[0]), "swapped": sum(right[1]), "both": both}
    return written[0], {"n": len(options.items), **counts}


def percent(count: int, n: int) -> str:
    """A share as a table's cell says it."""
    return f"{100 * count / n:.1f}" if n else "–"


def shares(row: dict[str, Any]) -> list[str]:
    """The cells of a row with the counts of `asked`."""
    return [percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both")]


def shortcut(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The no-name rule that goes farthest on these items, and its share."""
    found = shortcut_accuracies(items)
    # Rules that look at the asked name are the task itself, cut short.
    blind = {name: share for name, share in found.items() if "asked name" not in name}
    best = max(blind, key=lambda name: blind[name])
    return {"rule": best, "share": blind[best]}
