"""`mlx-coconut generate --model DIR --prompt TEXT`: ask a checkpoint questions."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from coconut.backend import MakeBackend
from coconut.batches.batch import chunks, collate
from coconut.batches.dataset import raise_all
from coconut.batches.decoding import Decoding
from coconut.checkpoints.adapter_files import read_adapter
from coconut.checkpoints.named import add_model, found_model, too_low
from coconut.checkpoints.source import base_of
from coconut.errors import UserError, guarded, options_of
from coconut.inside.graph import read_graph
from coconut.inside.known import strangeness
from coconut.inside.lens import Lens

LEAST = {"latents": 0, "max_new_tokens": 1, "batch_size": 1, "temperature": 0, "seed": 0}
"""The least value of each number that decides how questions are answered."""


@dataclass(frozen=True)
class Answer:
    """What a model says to a question, after so many thoughts.

    cut: it ends where the model's positions do.
    """

    question: str
    latents: int
    text: str
    cut: bool


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Answer the questions given, or one a line from standard input, in batches."""
    parser = options_of(twin, "generate", "Ask a checkpoint questions.")
    add_model(parser)
    add = parser.add_argument
    add("--adapter-path", metavar="DIR", type=Path, help="an adapter; --model is then its base")
    add("--question", "--prompt", action="append", metavar="TEXT", help="may be repeated")
    add("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    add("--max-new-tokens", "--max-tokens", type=int, default=128, metavar="N")
    add("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=64, metavar="B")
    add("--json", action="store_true", help="an object a question")
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
    """Answer questions in batches, after the thoughts the lens was given, else the checkpoint's.

    temperature: 0 is greedy. seed: of the draws. Answers come in the questions' order, as their
    batch is done. Raises UserError before the first for questions that are empty or too long.
    """
    tokenizer, limit = lens.tokenizer, lens.backend.n_positions
    problems, rows = [], []
    for i, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            problems.append(f"number {i}: expected a text, got {question!r}")
            continue
        row = replace(lens.prompt(question, lens.given_thoughts), idx=i)
        if limit is not None and len(row.ids) >= limit:
            problems.append(
                f"number {i}: {len(row.ids)} tokens, but the model has {limit} positions and an"
                " answer needs one; shorten it"
            )
        rows.append(row)
    raise_all("questions", problems)
    decoding = Decoding(max_new_tokens, tokenizer.eos_id, temperature, seed, tokenizer.ended)

    def answered() -> Iterator[Answer]:
        for part in chunks(np.arange(len(rows)), batch_size):
            batch = collate([rows[i] for i in part], tokenizer.pad_id)
            for i, tokens in zip(part, lens.backend.generate(batch, decoding), strict=True):
                text, cut = tokenizer.decode(tokens).strip(), decoding.ran_out(tokens)
                yield Answer(questions[i], rows[i].n_latents, text, cut)

    return answered()


def _answer(make_backend: MakeBackend, options: argparse.Namespace) -> None:
    if problems := too_low(options, **LEAST):
        raise UserError("command line", *problems)
    if not options.question and sys.stdin.isatty():
        print("questions, one a line; Ctrl-D ends them", file=sys.stderr)
    questions = options.question or [line.rstrip("\n") for line in sys.stdin]
    questions = [question for question in questions if question.strip()]
    if not questions:
        raise UserError("command line", "no question; give --question TEXT or lines on stdin")
    model, base = _asked(options)
    lens = Lens(model, make_backend, options.latents, base)
    given = {name: getattr(options, name) for name in LEAST if name != "latents"}
    found = answers(lens, questions, **given)
    for i, question in enumerate(questions):
        if problem := strangeness(lens.tokenizer, read_graph(question)):
            print(f"warning: question {i}: {problem}", file=sys.stderr)
    for answer in found:
        as_json = options.json and json.dumps(asdict(answer), ensure_ascii=False)
        print(as_json or answer.text, flush=True)
        if answer.cut:
            n = lens.backend.n_positions
            print(f"warning: answer cut where the model's {n} positions end", file=sys.stderr)


def _asked(options: argparse.Namespace) -> tuple[Path, str | None]:
    """(checkpoint, where its base is): --model, or the adapter beside it."""
    model, adapter = found_model(options.model), options.adapter_path
    if adapter is None:
        return model, options.base
    if options.base is not None:
        raise UserError("command line", "--base: --model is the base already")
    # Where the adapter's own base still lies, --model would not be looked at: hold it to that one.
    base_of(replace(read_adapter(adapter), base=str(model)), None)
    return adapter, str(model)
