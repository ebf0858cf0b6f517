"""What all analyses share: options, questions, thoughts, answers and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.backend import Decoding
from coconut.batches.batch import collate
from coconut.batches.curriculum import Sample, markers_of, question_row
from coconut.inside.lens import Lens
from coconut.text.answers import exact_match, extract

if TYPE_CHECKING:
    pass


SEED = 20_241
"""Of the generated sets; no training run of this project has it."""

DRAWN = 2
"""Thoughts whose values are drawn question by question, as in the paper."""

Table = tuple[list[str], list[list[Any]]]


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
    decoding = Decoding(options.max_new_tokens, lens.tokenizer.eos_id)
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
    markers = markers_of(lens.tokenizer)
    rows = []
    for i, question in enumerate(questions):
        sample = Sample(i, lens.tokenizer.encode_question(question + "\n"), [], [])
        rows.append(question_row(lens.config, sample, lens.stage, markers, n_thoughts))
    order = np.argsort([len(row.ids) for row in rows], kind="stable")
    for start in range(0, len(order), size):
        numbers = [int(i) for i in order[start : start + size]]
        yield numbers, collate([rows[i] for i in numbers], lens.tokenizer.pad_id)


def _right(written: Sequence[str], items: Sequence[dict[str, Any]]) -> np.ndarray:
    pairs = zip(written, items, strict=True)
    return np.array([exact_match(extract(text)[0], item["answer"]) for text, item in pairs])


def _accuracy(asked: np.ndarray, swapped: np.ndarray) -> dict[str, Any]:
    """Counts of questions right as asked, swapped and both."""
    return {
        "n": len(asked),
        "as_asked": int(asked.sum()),
        "swapped": int(swapped.sum()),
        "both": int((asked & swapped).sum()),
    }


def _questions(items: Sequence[dict[str, Any]]) -> list[str]:
    return [item["question"] for item in items]


def _percent(count: int, n: int) -> str:
    return f"{100 * count / n:.1f}" if n else "–"
