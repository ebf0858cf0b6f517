"""LaTRO's pre-experiment: how likely the right answer is without and with what people wrote.

x y       log p(answer | question)
x z y     log p(answer | question, written rationale)

That z makes y likelier is what LaTRO rests on. The answer is placed and scored as in LaTRO's reward
(`separator` and `reward_offset`, so `preset: released` too).
Source: arXiv 2411.04282, figure 2.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from coconut.backend import MakeBackend
from coconut.batches.batch import by_length
from coconut.batches.dataset import check_lengths
from coconut.batches.questions import Item, Questions
from coconut.batches.rollouts import Rollout, collate_rollouts
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.run.ending import measured_with, memory_used, write_results
from coconut.run.start import Run
from coconut.world import World


def measure(
    config: LatroConfig, make_backend: MakeBackend, twin: str, world: World | None = None
) -> dict[str, Any]:
    """Score every item that has a rationale; writes likelihoods.jsonl and summary.json.

    world: the processes that share the items; the first writes and speaks.
    """
    run = Run(config, twin, world)
    questions = Questions(config, run.tokenizer)
    path = questions.path(config.split)
    items = with_rationale(questions.items(config.split), path)
    lengths = {i: len(ids) for i, ids in scored(config, questions, items)}
    check_lengths(lengths, run.source.n_positions, path)
    without, given = rollouts(config, questions, items)
    run.agree([path])
    backend = run.build(make_backend)
    with run.begin() as console:
        run.greet(f" | {len(items):,} rationales of {path}")
        backend.memory()
        start = time.perf_counter()
        with console.progress("scored", 2 * len(items)) as bar:
            nats = [answer_logprobs(run, config, kind, bar.advance) for kind in (without, given)]
        seconds = time.perf_counter() - start
        n_tokens = np.array([len(item["response_ids"]) for item in items])
        rows = [
            {"idx": i["idx"], "without": float(a), "with": float(b), "answer_tokens": int(n)}
            for i, a, b, n in zip(items, *nats, n_tokens, strict=True)
        ]
        summary: dict[str, Any] = {
            "without": float(nats[0].mean()),
            "with": float(nats[1].mean()),
            "likelier_with": float((nats[1] > nats[0]).mean()),
            "without_per_token": float(nats[0].sum() / n_tokens.sum()),
            "with_per_token": float(nats[1].sum() / n_tokens.sum()),
            "n": len(items),
            "seconds": seconds,
            "separator": config.separator,
            "reward_offset": config.reward_offset,
            "chat_template": questions.uses_template,
            "prompt": questions.wording,
            "n_shots": questions.n_shots,
            **measured_with(run, path),
            "checkpoint": config.load_model_path or config.model_id,
            "dataset_name": config.dataset_name,
            "split": config.split,
            **memory_used(run.world, backend),
        }
        write_results(run, summary, "likelihoods.jsonl", rows)
        console.record("preexperiment", **summary)
        console.say(
            f"log p(answer), mean of {len(items):,}: {summary['without']:.3f} nats without"
            f" rationale, {summary['with']:.3f} with; likelier with it"
            f" {100 * summary['likelier_with']:.1f}%"
        )
    return summary


def with_rationale(items: Sequence[Item], path: str) -> list[Item]:
    """The items that people wrote a rationale for. Raises UserError if there are none."""
    written = [item for item in items if item.get("rationales", "").strip()]
    if not written:
        raise UserError(
            path,
            "no item has a rationale, so there is nothing to compare; a pre-experiment needs a data"
            " set with written ones (gsm8k)",
        )
    return written


def rollouts(
    config: LatroConfig, questions: Questions, items: Sequence[Item]
) -> tuple[list[Rollout], list[Rollout]]:
    """The items' answers right behind the question, and behind the written rationale.

    The separator stands before the answer in both, in place of a rationale's trailing white space.
    """
    encode = questions.tokenizer.encode
    bridge = encode(config.separator) if config.separator else []
    found: tuple[list[Rollout], list[Rollout]] = ([], [])
    for item in items:
        text = item["rationales"]
        rationale = encode(text.rstrip() if config.separator else text)
        for kind, shared in zip(found, ([], rationale), strict=True):
            prompt = questions.prompt(item).ids
            answer = item["response_ids"]
            kind.append(Rollout(prompt, shared, [], bridge, answer, len(shared), True))
    return found


def scored(
    config: LatroConfig, questions: Questions, items: Sequence[Item]
) -> list[tuple[int, list[int]]]:
    """(item's number, tokens) of the rows with a rationale. Raises UserError if there are none."""
    items = with_rationale(items, questions.path(config.split))
    _, given = rollouts(config, questions, items)
    return [
        (item["idx"], r.prompt + r.shared + r.bridge + r.answer)
        for item, r in zip(items, given, strict=True)
    ]


def answer_logprobs(
    run: Run, config: LatroConfig, rollouts: Sequence[Rollout], advance: Any = lambda n: None
) -> np.ndarray:
    """(B,) summed log-probability of every answer, nats. advance: told how many are done."""
    out = np.zeros(len(rollouts))

    def scored(part: np.ndarray) -> list[float]:
        chosen = [rollouts[i] for i in part]
        layout = (run.tokenizer.pad_id, config.pad_multiple, config.reward_offset)
        batch = collate_rollouts(chosen, *layout)
        return batch.sums(run.backend.score(batch).logprobs)[1].tolist()

    lengths = [len(r.prompt) + len(r.shared) for r in rollouts]
    parts = list(by_length(lengths, config.rollout_batch_size))
    for part, nats in zip(parts, run.world.deal(parts, scored, advance), strict=True):
        out[part] = nats
    return out
