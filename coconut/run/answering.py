"""Evaluation of a model on a data set's questions: greedy answers and the majority of k samples."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from coconut.backend import MakeBackend
from coconut.batches.dataset import check_lengths
from coconut.batches.questions import Questions
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.reporting.console import N_SHOWN, Console
from coconut.run.ending import measured_with, memory_used, say_cut, write_results
from coconut.run.latro.rationale_check import RationaleCheck
from coconut.run.sampling import decode_rows, decoding_of
from coconut.run.start import Run
from coconut.world import World

SHOWN = 60
"""Characters of an output that the terminal shows: its end."""


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the earliest of equals; empty ones do not count."""
    # Counter keeps the order of first sight, and most_common is stable.
    counted = Counter(answer for answer in answers if answer).most_common(1)
    return counted[0][0] if counted else ""


def evaluate_data_set(
    config: RunConfig, make_backend: MakeBackend, twin: str, world: World | None = None
) -> dict[str, Any]:
    """Answer config.split once; writes predictions.jsonl and summary.json, returns the summary.

    world: the processes that share the questions; the first writes and speaks.
    """
    run = Run(config, twin, world)
    questions = Questions(config, run.tokenizer)
    items, path = questions.items(config.split), questions.path(config.split)
    check_room(questions, items, path, run.source.n_positions)
    check = None
    if isinstance(config, LatroConfig) and config.rationale_check:
        check = RationaleCheck(config, run.tokenizer, items, run.source.n_positions)
    run.agree([path])
    run.build(make_backend)
    with run.begin() as console:
        thoughts = getattr(config, "latro_latents", 0)
        is_new = thoughts and not (run.made_with or {}).get("latent_ids")
        note = f"note: latro_latents: {thoughts}, but this model was trained without thoughts"
        run.greet(f" | {len(items):,} items of {path}", *[note] * bool(is_new))
        with console.progress(config.split, len(items) * (1 + config.maj_k)) as bar:
            predictions, summary, tokens = answer(run, questions, items, bar.advance)
        if check is not None:
            summary["rationales"] = check.run(run, tokens)
        summary |= {
            **measured_with(run, path),
            "checkpoint": config.load_model_path or config.model_id,
            "dataset_name": config.dataset_name,
            "split": config.split,
        }
        write_results(run, summary, "predictions.jsonl", predictions)
        _say(console, summary, predictions)
        say_cut(run, summary["out_of_positions"])
    return summary


def answer(
    run: Run,
    questions: Questions,
    items: Sequence[dict[str, Any]],
    advance: Callable[[int], None],
) -> tuple[list[dict[str, Any]], dict[str, Any], list[list[int]]]:
    """(predictions in the items' order, summary, tokens of the greedy outputs).

    With maj_k, so many samples stand beside each.

    run: its processes share the questions; all of them get the whole result. advance: told how many
    outputs were finished.
    """
    config, backend = run.config, run.backend
    backend.memory()
    start = time.perf_counter()
    asked = (run, [questions.prompt(item) for item in items], questions)
    greedy = [x for (x,) in decode_rows(*asked, 1, config.temperature, advance=advance)]
    votes: list[list[list[int]]] = [[] for _ in items]
    if config.maj_k:
        votes = decode_rows(*asked, config.maj_k, config.maj_temperature, advance=advance)
    predictions = [_judged(questions, *asked) for asked in zip(items, greedy, votes, strict=True)]
    ran_out = decoding_of(questions).ran_out
    for prediction, tokens in zip(predictions, greedy, strict=True):
        prediction["out_of_positions"] = ran_out(tokens)
    summary = _summary(config, predictions, time.perf_counter() - start)
    cut = [ran_out(tokens) for each in (*([t] for t in greedy), *votes) for tokens in each]
    summary |= {
        "stage": 0,
        "n_shots": questions.n_shots,
        "chat_template": questions.uses_template,
        "prompt": questions.wording,
        "out_of_positions": sum(cut),
        **memory_used(run.world, backend),
    }
    return predictions, summary, greedy


def check_room(
    questions: Questions, items: Sequence[dict[str, Any]], path: str, n_positions: int | None
) -> None:
    """Raise UserError naming items whose prompt leaves no position for an answer."""
    lengths = {item["idx"]: len(questions.prompt(item).ids) + 1 for item in items}
    check_lengths(lengths, n_positions, path)


def _say(console: Console, summary: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> None:
    """A few answers and the result on the terminal, the result in the log too."""
    for p in predictions[:N_SHOWN]:
        mark = "right" if p["correct"] else f"wrong: {p['gold']}"
        output = " ".join(p["output"].split())
        shown = output if len(output) <= SHOWN else "..." + output[-SHOWN:]
        console.say(f"  {shown or '(nothing)'} | {p['answer'] or '(no answer)'} | {mark}")
    n = summary["n"]

    def share(name: str) -> tuple[int, int] | None:
        return (round(summary[name] * n), n) if name in summary else None

    console.event(
        "eval",
        answer=share("accuracy"),
        majority=share("maj_accuracy"),
        unfinished=share("unfinished"),
        new_tokens=summary["new_tokens_per_question"],
        samples_per_second=summary["samples_per_second"],
        **{name: n for name, n in summary.items() if name.endswith("_memory_bytes")},
        out_of_positions=summary["out_of_positions"] or None,
    )
    for kind, found in summary.get("rationales", {}).items():
        console.record("rationales", which=kind, **found)
        console.say(
            f"  {kind} rationale | answer {100 * found['accuracy']:.1f}%"
            f" | log p(answer) {found['reward']:.3f}"
        )


def _judged(
    questions: Questions,
    item: dict[str, Any],
    tokens: list[int],
    samples: Sequence[list[int]],
) -> dict[str, Any]:
    """The prediction of an item from its greedy tokens and those of the votes."""
    decode, data = questions.tokenizer.decode, questions.data
    output = decode(tokens)
    prediction = {
        "idx": item["idx"],
        "prompt_tokens": len(questions.prompt(item).ids),
        "output": output,
        **questions.judge(output, item),
        "new_tokens": len(tokens),
        "ended": bool(tokens) and tokens[-1] in questions.stop_ids,
    }
    if samples:
        votes = [data.answer(decode(sample), item) for sample in samples]
        vote = majority(votes)
        prediction |= {"votes": votes, "maj_answer": vote, "maj_correct": vote == item["gold"]}
    return prediction


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
        "temperature": config.temperature,
        "response_length": config.response_length,
        "seed": config.seed,
    }
    if config.maj_k:
        votes = sum(len([v for v in p["votes"] if v]) for p in predictions)
        summary |= {
            "maj_k": config.maj_k,
            "maj_temperature": config.maj_temperature,
            "maj_accuracy": share("maj_correct"),
            "maj_no_answer": 1 - votes / (n * config.maj_k),
        }
    return summary
