"""Evaluation of a model on questions: batches, answers, the swap test, the summary."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coconut.batches.batch import by_length, chunks, collate
from coconut.batches.curriculum import (
    Sample,
    item_rng,
    markers_of,
    question_row,
    remaining_steps,
    training_row,
)
from coconut.batches.decoding import Decoding
from coconut.config.keys import RunConfig
from coconut.run.ending import measured_with, memory_used, say_cut, write_results
from coconut.run.start import Run
from coconut.text.answers import classify_chain, cot_match, exact_match, extract, numeric_match
from coconut.text.tokenizer import Tokenizer

Questions = tuple[Sequence[dict[str, Any]], Sequence[Sample]]
"""Items, and each one's tokens."""


@dataclass
class Evaluation:
    """Predictions in the data's order, and what they add up to."""

    predictions: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate(
    run: Run,
    items: Sequence[dict[str, Any]],
    samples: Sequence[Sample],
    stage: int,
    swapped: Questions | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Answer every question at a stage and compare.

    run: its processes share the questions; all of them get the whole result.
    swapped: the same items asking for the other name (ProsQA); both-right is then counted.
    advance: told how many questions were answered, for a progress bar.
    """
    backend = run.backend
    backend.memory()
    backend.thought_statistics()
    start = time.perf_counter()
    asked: Questions = (items, samples)
    others: list[dict[str, Any]] = []
    # Where rows read each other, no row may meet its swapped form.
    if swapped is None or backend.mixes_rows:
        (predictions,) = _answer(run, [asked], stage, advance)
    else:
        predictions, others = _answer(run, [asked, swapped], stage, advance)
    seconds = time.perf_counter() - start
    summary = _count(predictions, seconds, len(predictions) + len(others))
    if thoughts := backend.thought_statistics():
        summary["thoughts"] = thoughts
    if swapped is not None:
        others = others or _answer(run, [swapped], stage, advance)[0]
        for prediction, other in zip(predictions, others, strict=True):
            prediction["swapped_answer"] = other["answer"]
            prediction["swapped_correct"] = other["correct"]
        n = len(predictions)
        both = sum(p["correct"] and p["swapped_correct"] for p in predictions)
        summary["swapped_accuracy"] = sum(p["swapped_correct"] for p in predictions) / n
        summary["both_accuracy"] = both / n
    classes = [p["outcome"] for p in predictions if "outcome" in p]
    if classes:
        summary["outcomes"] = {name: classes.count(name) for name in sorted(set(classes))}
    n_latents = [p["n_latents"] for p in predictions]
    summary |= {
        "stage": stage,
        "n_latents": [min(n_latents), max(n_latents)],
        "out_of_positions": sum(p["out_of_positions"] for p in [*predictions, *others]),
        **memory_used(run.world, backend),
    }
    return Evaluation(predictions, summary)


def _answer(
    run: Run,
    forms: Sequence[Questions],
    stage: int,
    advance: Callable[[int], None],
) -> list[list[dict[str, Any]]]:
    """Predictions for each form of the questions; what an item's forms begin with is read once."""
    backend, config, tokenizer = run.backend, run.config, run.tokenizer
    markers = markers_of(tokenizer)
    n, n_forms = len(forms[0][0]), len(forms)
    all_items = [item for items, _ in forms for item in items]
    samples = [sample for _, samples in forms for sample in samples]
    rows = [question_row(config, sample, stage, markers, config.n_latents) for sample in samples]
    how = (config.temperature, config.seed, tokenizer.ended)
    decoding = Decoding(config.new_tokens, tokenizer.eos_id, *how)
    lengths = [len(row.ids) for row in rows[:n]]
    batches = [
        np.concatenate([numbers + n * form for form in range(n_forms)])
        for numbers in by_length(lengths, max(1, config.eval_batch_size // n_forms))
    ]

    def said(numbers: np.ndarray) -> list[list[int]]:
        source = numbers % n if n_forms > 1 else None
        batch = collate([rows[i] for i in numbers], tokenizer.pad_id, source=source)
        # What thoughts look like is said of the questions as asked.
        return backend.generate(batch, decoding, n_measured=len(numbers) // n_forms)

    found = zip(batches, run.world.deal(batches, said, advance), strict=True)
    answers = {i: tokens for part in found for i, tokens in zip(*part, strict=True)}
    judged = [
        _judge(config, tokenizer, all_items[i], stage, answers[i])
        | {"idx": row.idx, "prompt_tokens": len(row.ids), "n_latents": row.n_latents}
        | {"out_of_positions": decoding.ran_out(answers[i])}
        for i, row in enumerate(rows)
    ]
    return [judged[start : start + n] for start in range(0, len(rows), n)]


def _judge(
    config: RunConfig,
    tokenizer: Tokenizer,
    item: dict[str, Any],
    stage: int,
    new_tokens: list[int],
) -> dict[str, Any]:
    text = tokenizer.decode(new_tokens)
    answer, chain = extract(text)
    kept = remaining_steps(config, stage, len(item["steps"]))
    expected = item["steps"][len(item["steps"]) - kept :]
    judged: dict[str, Any] = {
        "output": text,
        "answer": answer,
        "gold": item["answer"],
        "correct": exact_match(answer, item["answer"]),
        "correct_as_number": numeric_match(answer, item["answer"]),
        "cot_match": cot_match(chain, expected) if expected else None,
        "new_tokens": len(new_tokens),
        "ended": tokenizer.ended(new_tokens),
    }
    if "edges" in item and kept == len(item["steps"]):
        # Only a chain that should be whole can be held against the graph.
        judged["outcome"] = str(classify_chain(item, chain.split("\n"), answer))
    return judged


def _count(predictions: Sequence[dict[str, Any]], seconds: float, n_asked: int) -> dict[str, Any]:
    n = len(predictions)
    accuracy = sum(p["correct"] for p in predictions) / n
    # Where all steps are in latents there is no chain to get right or wrong.
    chains = [p["cot_match"] for p in predictions if p["cot_match"] is not None]
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "accuracy_as_number": sum(p["correct_as_number"] for p in predictions) / n,
        "cot_match": sum(chains) / len(chains) if chains else None,
        "chains": len(chains),
        "n": n,
        "seconds": seconds,
        "samples_per_second": n_asked / seconds,
        "new_tokens_per_question": sum(p["new_tokens"] for p in predictions) / n,
        "unfinished": sum(not p["ended"] for p in predictions) / n,
    }


def validation_loss(run: Run, samples: Sequence[Sample], stage: int, epoch: int) -> float:
    """Mean loss a label, nats, over the samples at the stage itself (no draws)."""
    config, tokenizer = run.config, run.tokenizer
    markers = markers_of(tokenizer)

    def loss_of(numbers: np.ndarray) -> tuple[float, int]:
        rows = [
            training_row(config, samples[i], stage, markers, item_rng(config.seed, 0, i), epoch + 1)
            for i in numbers
        ]
        part = run.backend.eval_loss(collate(rows, tokenizer.pad_id, config.pad_multiple))
        return part.loss_sum, part.n_targets

    batches = list(chunks(np.arange(len(samples)), config.batch_size_training))
    # Added in the order of one process: the same sum to the last bit.
    losses, counts = zip(*run.world.deal(batches, loss_of), strict=True)
    return sum(losses) / max(sum(counts), 1)


def report(
    run: Run, result: Evaluation, data: str, epoch: int | None = None, loss: float | None = None
) -> None:
    """Write predictions and summary, and say what came out.

    data: file of the questions. epoch: after which the run was evaluated, from 0; None for an
    evaluation by itself.
    """
    config, s = run.config, result.summary
    asked = (config.load_model_path or config.model_id) if epoch is None else str(run.directory)
    s |= {
        "loss": loss,
        "epoch": None if epoch is None else epoch + 1,
        **measured_with(run, data),
        "checkpoint": asked,
    }
    write_results(run, s, "predictions.jsonl", result.predictions)

    def share(name: str, n: int = s["n"]) -> tuple[int, int] | None:
        return (round(s[name] * n), n) if s.get(name) is not None else None

    run.console.event(
        "eval",
        epoch=s["epoch"],
        n_epochs=None if epoch is None else config.num_epochs,
        stage=s["stage"],
        loss=loss,
        answer=share("accuracy"),
        swapped=share("swapped_accuracy"),
        both=share("both_accuracy"),
        cot=share("cot_match", s.get("chains", 0)),
        new_tokens=s["new_tokens_per_question"],
        samples_per_second=s["samples_per_second"],
        **{name: n for name, n in s.items() if name.endswith("_memory_bytes")},
        out_of_positions=s["out_of_positions"] or None,
    )
    say_cut(run, s["out_of_positions"])
    if s.get("thoughts"):
        run.console.record("thoughts", epoch=s["epoch"], stage=s["stage"], **s["thoughts"])
    for name, count in s.get("outcomes", {}).items():
        run.console.say(f"  {name}: {count}")
