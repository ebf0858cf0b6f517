"""Reads and checks the data: items of question, answer and steps -> tokenised samples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.batches.curriculum import MOST_LATENTS, Sample
from coconut.errors import UserError, shown
from coconut.tasks.files import read_records
from coconut.tasks.graphs import graph_problems
from coconut.text.tokenizer import Tokenizer

CHECKED_ITEMS = 50_000
"""Of a larger file, this many evenly spread items are compared with the whole text's tokens."""
SHOWN_PROBLEMS = 5


def read_items(path: str | Path) -> list[dict[str, Any]]:
    """Items of a data file, checked. Extra keys are kept. Raises UserError naming file and item."""
    where = str(path)
    if not Path(path).exists():
        raise UserError(where, "no such file; data/README.md says how to make it")
    items = [item for _, item in read_records(path)]
    if not items:
        raise UserError(where, "holds no items")
    problems = [f"item {i}: {text}" for i, item in enumerate(items) for text in _complaints(item)]
    raise_all(where, problems)
    return items


def _complaints(item: Any) -> list[str]:
    if not isinstance(item, dict):
        return [f"expected an object, got {type(item).__name__}"]
    found = []
    for name in ("question", "answer"):
        if name not in item:
            found.append(f"{name} is missing")
        elif not isinstance(item[name], str):
            found.append(f"{name} must be text, got {type(item[name]).__name__}")
        elif not item[name].strip():
            found.append(f"{name} is empty")
    steps = item.get("steps")
    if "steps" not in item:
        published = "####" in str(item.get("answer"))
        remedy = "python data/gsm8k.py makes items of GSM8K" if published else "or a text cot"
        found.append(f"steps is missing (an empty list is allowed; {remedy})")
    elif not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        found.append("steps must be a list of texts")
    latents = item.get("latents", 0)
    if type(latents) is not int or not 0 <= latents <= MOST_LATENTS:
        most = f"latents must be a number of latents, at most {MOST_LATENTS:,}"
        found.append(f"{most}, got {shown(latents)}")
    thoughts = item.get("thoughts", [])
    if not isinstance(thoughts, list) or not all(isinstance(t, str) and t for t in thoughts):
        found.append("thoughts must be a list of texts, one a latent")
    elif thoughts and len(thoughts) != latents:
        found.append(f"thoughts must be one text for each of its latents, got {len(thoughts)}")
    found += graph_problems(item)
    try:
        json.dumps(item, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        found.append("holds a lone surrogate, which no tokenizer can encode")
    return found


def tokenize(
    items: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    numbers: Sequence[int] | None = None,
) -> list[Sample]:
    """Tokens of every item, part by part as published, and compared with those of the whole text.

    where: the file's name, for messages. numbers: the items' numbers in that file, if they are a
    selection. Raises UserError naming items whose parts do not add up.
    """
    samples = []
    stride = max(1, len(items) // CHECKED_ITEMS)
    problems = []
    for i, item in enumerate(items):
        idx = i if numbers is None else numbers[i]
        question = tokenizer.encode_question(item["question"] + "\n")
        steps = [tokenizer.encode(step + "\n") for step in item["steps"]]
        answer = tokenizer.encode("### " + item["answer"])
        if i % stride == 0:
            # An empty step, as the published conversion of GSM8K leaves behind, is a bare line end,
            # which many vocabularies join to the one before it.
            written = [step for step in item["steps"] if step]
            whole = "\n".join([item["question"], *written, "### " + item["answer"]])
            of_steps = [step for text, step in zip(item["steps"], steps, strict=True) if text]
            parts = [*question, *(token for step in of_steps for token in step), *answer]
            if tokenizer.encode_question(whole) != parts:
                problems.append(
                    f"item {idx}: its parts, tokenised alone, are not the tokens of the whole text;"
                    " remove white space at the ends of question, steps and answer"
                )
        latents = item.get("latents")
        # A thought is one position: it is taught the first token of its text.
        thoughts = tuple(tokenizer.encode(text)[0] for text in item.get("thoughts", []))
        samples.append(Sample(idx, question, steps, [*answer, tokenizer.eos_id], latents, thoughts))
    if problems and not _joins(tokenizer):
        raise UserError(
            f"tokenizer {tokenizer.name}",
            "reads a line alone as other tokens than within a text, so no item can be made of"
            " parts; choose another (key tokenizer)",
        )
    raise_all(where, problems)
    return samples


def _joins(tokenizer: Tokenizer) -> bool:
    """Whether plain lines, encoded one by one, are the tokens of the text that they make."""
    first, *others = lines = ["a b\n", "c d\n", "### e"]
    parts = [*tokenizer.encode_question(first), *(t for x in others for t in tokenizer.encode(x))]
    return parts == tokenizer.encode_question("".join(lines))


def check_lengths(lengths: Mapping[int, int], n_positions: int | None, where: str) -> None:
    """Raise UserError naming items (number -> tokens at most) that the model has no room for."""
    problems = [
        f"item {idx}: up to {n} tokens with its latents, but the model has {n_positions} positions;"
        " shorten or remove the item"
        for idx, n in lengths.items()
        if n_positions is not None and n > n_positions
    ]
    raise_all(where, problems)


def raise_all(where: str, problems: list[str]) -> None:
    """Raise UserError with the first problems and the number of the rest, if there are any."""
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"... and {more} more problems"] if more > 0 else []
        raise UserError(where, *problems[:SHOWN_PROBLEMS], *rest)
