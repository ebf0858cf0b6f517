"""Evaluation of a model on a data set's questions: greedy answers and the majority of k samples."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut import checkpoint
from coconut.backend import Backend, Decoding
from coconut.batch import collate
from coconut.config import RunConfig
from coconut.console import Console
from coconut.curriculum import Row
from coconut.errors import UserError
from coconut.questions import Questions
from coconut.source import open_source

if TYPE_CHECKING:
    from coconut.runner import MakeBackend


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the earliest of equals; empty ones do not count."""
    # Counter keeps the order of first sight, and most_common is stable.
    counted = Counter(answer for answer in answers if answer).most_common(1)
    return counted[0][0] if counted else ""


def evaluate_data_set(config: RunConfig, make_backend: MakeBackend, twin: str) -> dict[str, Any]:
    """Answer config.split once; writes predictions.jsonl and summary.json, returns the summary."""
    from coconut.runner import write_text

    opened = open_source(config)
    questions = Questions(config, opened.tokenizer)
    items = questions.items(config.split)
    backend = make_backend(config, opened.source)
    with Console(config.run_dir) as console:
        write_text(config.run_dir / "config.yaml", config.to_yaml())
        start = time.perf_counter()
        predictions = answer_items(backend, config, questions, items)
        path = questions.path(config.split)
        summary = _summary(config, predictions, time.perf_counter() - start) | {
            "method": config.method,
            "backend": twin,
            "checkpoint": config.load_model_path or config.model_id,
            "data": path,
            "data_sha256": checkpoint.sha256(Path(path)),
            "split": config.split,
        }
        lines = [json.dumps(p, ensure_ascii=False) + "\n" for p in predictions]
        write_text(config.run_dir / "predictions.jsonl", "".join(lines))
        write_text(config.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        n = len(predictions)
        console.event("eval", answer=(sum(p["correct"] for p in predictions), n))
    return summary


def answer_items(
    backend: Backend, config: RunConfig, questions: Questions, items: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A prediction an item, in the items' order; maj_k samples beside it if configured."""
    predictions = []
    greedy = _outputs(backend, config, questions, items, 1, config.temperature)
    votes: list[list[list[int]]] = [[] for _ in items]
    if config.maj_k:
        k = config.maj_k
        votes = _outputs(backend, config, questions, items, k, config.maj_temperature)
    for item, (tokens,), samples in zip(items, greedy, votes, strict=True):
        output = questions.tokenizer.decode(tokens)
        answer = questions.data.answer(output, item)
        corrected = answer == item["gold"]
        rule = getattr(questions.data, "released", None)
        released = corrected if rule is None else rule(output, item)
        prediction = {
            "idx": item["idx"],
            "prompt_tokens": len(item["query_ids"]),
            "output": output,
            "answer": answer,
            "gold": item["gold"],
            "correct": corrected if config.answer_rule == "corrected" else released,
            "correct_corrected": corrected,
            "correct_released": released,
            "new_tokens": len(tokens),
            "ended": bool(tokens) and tokens[-1] in questions.stop_ids,
        }
        if samples:
            decode = questions.tokenizer.decode
            said = [questions.data.answer(decode(sample), item) for sample in samples]
            vote = majority(said)
            prediction |= {"votes": said, "maj_answer": vote, "maj_correct": vote == item["gold"]}
        predictions.append(prediction)
    return predictions


def _outputs(
    backend: Backend,
    config: RunConfig,
    questions: Questions,
    items: Sequence[dict[str, Any]],
    k: int,
    temperature: float,
) -> list[list[list[int]]]:
    """k outputs of every item."""
    longest = max(len(item["query_ids"]) for item in items)
    room = config.new_tokens if backend.n_positions is None else backend.n_positions - longest
    if room < 1:
        raise UserError(
            str(config.dataset_name), f"a prompt of {longest} tokens fills the model's positions"
        )
    stops = questions.stop_ids
    decoding = Decoding(
        min(config.new_tokens, room),
        questions.end_id,
        temperature,
        config.seed,
        lambda tokens: tokens[-1] in stops,
    )
    # A number of its own for each sample names its random stream.
    rows = [
        Row(item["idx"] * k + j, item["query_ids"], None, -1, 0) for item in items for j in range(k)
    ]
    out: list[list[int]] = [[] for _ in rows]
    order = np.argsort([len(row.ids) for row in rows], kind="stable")
    for start in range(0, len(order), config.eval_batch_size):
        part = order[start : start + config.eval_batch_size]
        batch = collate([rows[i] for i in part], questions.tokenizer.pad_id)
        for i, tokens in zip(part, backend.generate(batch, decoding), strict=True):
            out[i] = tokens
    return [out[i : i + k] for i in range(0, len(out), k)]


def _summary(
    config: RunConfig, predictions: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    n = len(predictions)

    def share(name: str) -> float:
        return sum(p[name] for p in predictions) / n

    accuracy = share("correct")
    summary = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "answer_rule": config.answer_rule,
        "accuracy_corrected": share("correct_corrected"),
        "accuracy_released": share("correct_released"),
        "no_answer": sum(p["answer"] == "" for p in predictions) / n,
        "n": n,
        "seconds": seconds,
        "samples_per_second": n / seconds,
        "new_tokens_per_question": share("new_tokens"),
        "unfinished": 1 - share("ended"),
    }
    if config.maj_k:
        summary |= {"maj_k": config.maj_k, "maj_accuracy": share("maj_correct")}
    return summary
