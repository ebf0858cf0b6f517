"""`python -m TWIN.generate --model DIR --question TEXT`: ask a checkpoint questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from coconut.backend import Decoding
from coconut.batches.batch import chunks, collate
from coconut.batches.curriculum import Sample, markers_of, question_row
from coconut.batches.dataset import raise_all
from coconut.checkpoints.named import add_model, too_low
from coconut.errors import UserError, guarded
from coconut.inside.lens import Lens

if TYPE_CHECKING:
    from coconut.backend import MakeBackend

LEAST = {"latents": 0, "max_new_tokens": 1, "batch_size": 1, "temperature": 0, "seed": 0}
"""The least value of each number that decides how questions are answered."""


@dataclass(frozen=True)
class Answer:
    """What a model says to a question, after so many thoughts."""

    question: str
    latents: int
    text: str


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Answer the questions given, or one a line from standard input, in batches."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {twin}.generate", description="Ask a checkpoint questions."
    )
    add_model(parser)
    parser.add_argument("--question", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, metavar="B")
    parser.add_argument("--json", action="store_true", help="an object a question")
    options = parser.parse_args(argv)
    guarded(lambda: _answer(make_backend, options))


def answers(
    lens: Lens,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Answer]:
    """Answer questions in batches, with the thoughts the lens was given, else the checkpoint's own.

    temperature: 0 is greedy. seed: of the draws. Answers come in the questions' order, as their
    batch is done. Raises UserError before the first for an empty or too long question.
    """
    tokenizer, limit = lens.tokenizer, lens.backend.n_positions
    markers, n_latents = markers_of(tokenizer), lens.given_thoughts
    problems, rows = [], []
    for i, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            problems.append(f"number {i}: expected a text, got {question!r}")
            continue
        sample = Sample(i, tokenizer.encode_question(question + "\n"), [], [])
        row = question_row(lens.config, sample, lens.stage, markers, n_latents)
        if limit is not None and len(row.ids) + max_new_tokens > limit:
            problems.append(
                f"number {i}: {len(row.ids)} tokens and {max_new_tokens} new ones, but the"
                f" model has {limit} positions; shorten it or lower --max-new-tokens"
            )
        rows.append(row)
    raise_all("questions", problems)
    decoding = Decoding(max_new_tokens, tokenizer.eos_id, temperature, seed)

    def answered() -> Iterator[Answer]:
        for part in chunks(np.arange(len(rows)), batch_size):
            batch = collate([rows[i] for i in part], tokenizer.pad_id)
            for i, tokens in zip(part, lens.backend.generate(batch, decoding), strict=True):
                text = tokenizer.decode(tokens).strip()
                yield Answer(questions[i], rows[i].n_latents, text)

    return answered()


def _answer(make_backend: MakeBackend, options: argparse.Namespace) -> None:
    if problems := too_low(options, **LEAST):
        raise UserError("command line", *problems)
    questions = options.question or [line.rstrip("\n") for line in sys.stdin]
    questions = [question for question in questions if question.strip()]
    if not questions:
        raise UserError("command line", "no question; give --question TEXT or lines on stdin")
    lens = Lens(options.model, make_backend, options.latents, options.base)
    given = {name: getattr(options, name) for name in LEAST if name != "latents"}
    for answer in answers(lens, questions, **given):
        as_json = options.json and json.dumps(asdict(answer), ensure_ascii=False)
        print(as_json or answer.text, flush=True)
