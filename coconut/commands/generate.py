"""`mlx-coconut generate --model DIR --prompt TEXT`: ask a checkpoint questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.backend import Decoding
from coconut.batches.batch import collate
from coconut.batches.curriculum import Sample, markers_of, question_row
from coconut.checkpoints.adapter_files import read_adapter
from coconut.checkpoints.named import add_model, checkpoint_config, found_model, too_low
from coconut.checkpoints.source import base_of, open_source
from coconut.config.keys import RunConfig
from coconut.errors import UserError, guarded, typed
from coconut.inside.graph import read_graph
from coconut.inside.known import strangeness

if TYPE_CHECKING:
    from coconut.backend import MakeBackend


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Answer the questions given, or one a line from standard input, in batches."""
    parser = argparse.ArgumentParser(
        prog=typed(twin, "generate"), description="Ask a checkpoint questions."
    )
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


def _answer(make_backend: MakeBackend, options: argparse.Namespace) -> None:
    least = {"latents": 0, "max_new_tokens": 1, "batch_size": 1, "temperature": 0, "seed": 0}
    if problems := too_low(options, **least):
        raise UserError("command line", *problems)
    questions = options.question or [line.rstrip("\n") for line in sys.stdin]
    questions = [question for question in questions if question.strip()]
    if not questions:
        raise UserError("command line", "no question; give --question TEXT or lines on stdin")

    config = _asked(options)
    opened = open_source(config)
    tokenizer, made_with = opened.tokenizer, opened.coconut or {}
    backend = make_backend(config, opened.source)
    samples = [
        Sample(i, tokenizer.encode_question(question + "\n"), [], [])
        for i, question in enumerate(questions)
    ]
    stage = made_with.get("stage", 0)
    rows = [
        question_row(config, sample, stage, markers_of(tokenizer), options.latents)
        for sample in samples
    ]
    limit = backend.n_positions
    too_long = [
        f"question {row.idx}: {len(row.ids)} tokens and {options.max_new_tokens} new ones, but the"
        f" model has {limit} positions; shorten it or lower --max-new-tokens"
        for row in rows
        if limit is not None and len(row.ids) + options.max_new_tokens > limit
    ]
    if too_long:
        raise UserError("command line", *too_long)
    for i, question in enumerate(questions):
        if problem := strangeness(tokenizer, read_graph(question)):
            print(f"warning: question {i}: {problem}", file=sys.stderr)
    decoding = Decoding(options.max_new_tokens, tokenizer.eos_id, options.temperature, options.seed)
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        answers = backend.generate(collate(part, tokenizer.pad_id), decoding)
        for row, tokens in zip(part, answers, strict=True):
            text = tokenizer.decode(tokens).strip()
            if options.json:
                found = {"question": questions[row.idx], "latents": row.n_latents, "text": text}
                text = json.dumps(found, ensure_ascii=False)
            print(text, flush=True)


def _asked(options: argparse.Namespace) -> RunConfig:
    """The configuration that the checkpoint, or the adapter beside --model, is asked under."""
    model, adapter = found_model(options.model), options.adapter_path
    if adapter is None:
        return checkpoint_config(model, options.base)
    if options.base is not None:
        raise UserError("command line", "--base: --model is the base already")
    # Where the adapter's own base still lies, --model would not be looked at: hold it to that one.
    base_of(replace(read_adapter(adapter), base=str(model)), None)
    return checkpoint_config(adapter, str(model))
