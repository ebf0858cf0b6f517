"""What a model in LaTRO training answers, and whether its rationales make the answers likelier."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coconut.batches.batch import chunks, collate
from coconut.batches.decoding import Decoding
from coconut.batches.rollouts import exchanged
from coconut.run.latro.diagnostics import lost_rationales
from coconut.run.latro.draw_and_score import Rollouts


def answers(rollouts: Rollouts, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Greedy answers, and the answer's likelihood after its own, another's and no rationale.

    warning: that rationales do not matter; None if they do.
    """
    config, d, world = rollouts.config, rollouts.data, rollouts.world
    backend, tokenizer = rollouts.backend, rollouts.data.tokenizer
    decoding = Decoding(
        config.response_length,
        d.end_id,
        stops=lambda tokens: tokens[-1] in d.stop_ids,
    )
    prompts = [d.prompt(item) for item in items]

    def said(part: np.ndarray) -> list[list[int]]:
        return backend.generate(collate([prompts[i] for i in part], tokenizer.pad_id), decoding)

    parts = list(chunks(np.arange(len(items)), config.eval_batch_size))
    outputs = [tokens for part in world.deal(parts, said) for tokens in part]
    own = [d.rollout(*x) for x in zip(prompts, outputs, items, strict=True)]
    kinds = exchanged(own, d.separator_ids).values()
    scored = [rollouts.score(kind).answers for kind in kinds]
    rewards = [x.mean() for x in scored]
    texts = [tokenizer.decode(tokens) for tokens in outputs]
    judged = [d.judge(text, item) for text, item in zip(texts, items, strict=True)]
    right = [one["correct"] for one in judged]
    return {
        "eval/zero_shot_acc": float(np.mean(right)),
        "answer_rule": config.answer_rule,
        "accuracy_corrected": float(np.mean([one["correct_corrected"] for one in judged])),
        "accuracy_released": float(np.mean([one["correct_released"] for one in judged])),
        "objective/eval_reward": float(rewards[0]),
        "eval/reward_shuffled": float(rewards[1]),
        "eval/reward_empty": float(rewards[2]),
        "eval/finished": float(np.mean([r.is_finished for r in own])),
        "n": len(items),
        "warning": lost_rationales(scored[0], scored[1]),
        "rows": [
            {
                "query": item["queries"],
                "response": text,
                "truncated": tokenizer.decode(tokens[: r.n_said]),
                "gold": item["gold"],
                "answer": one["answer"],
                "correct": one["correct"],
            }
            for item, text, tokens, r, one in zip(items, texts, outputs, own, judged, strict=True)
        ],
    }


def in_words(title: str, found: dict[str, Any]) -> str:
    """The line of an evaluation."""
    return (
        f"{title} | accuracy {100 * found['eval/zero_shot_acc']:.1f}%"
        f" | reward {found['objective/eval_reward']:.3f}, shuffled"
        f" {found['eval/reward_shuffled']:.3f}, empty {found['eval/reward_empty']:.3f}"
        f" | n {found['n']}"
    )
