"""Does the rationale matter? The same questions after their own, another question's and none.

    x z y      own: what the model itself said
    x z'y      shuffled: what it said to the next question
    x   y      empty

A model that has learnt its questions by heart answers them alike after all three: LaTRO's reward
rises then without any reasoning.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coconut.batches.latro_prompts import Data, check_room
from coconut.batches.questions import Item
from coconut.batches.rollouts import exchanged
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.run.latro.preexperiment import answer_logprobs
from coconut.run.sampling import decode_rows
from coconut.run.start import Run
from coconut.text.tokenizer import Tokenizer


class RationaleCheck:
    """The check of one evaluation. Raises UserError if the items or the model have no room for it.

    n_positions: of the model, None if it has no limit.
    """

    def __init__(
        self,
        config: LatroConfig,
        tokenizer: Tokenizer,
        items: Sequence[Item],
        n_positions: int | None,
    ):
        self.config, self.items, self.questions = config, items, Data(config, tokenizer)
        if len(items) < 2:
            where = self.questions.path(config.split)
            raise UserError(where, "rationale_check: needs at least two questions to exchange")
        check_room(self.questions, {config.split: items}, n_positions)

    def run(self, run: Run, outputs: Sequence[Sequence[int]]) -> dict[str, dict[str, Any]]:
        """Accuracy and mean log-likelihood of the answer (nats) after each kind of rationale.

        run: its model answers, its processes share the work. outputs: what it answered to each
        item, from which its rationale is cut.
        """
        questions, tokenizer = self.questions, self.questions.tokenizer
        prompts = [questions.prompt(item) for item in self.items]
        own = [questions.rollout(*x) for x in zip(prompts, outputs, self.items, strict=True)]
        openings = [tokenizer.encode(_opening(questions.data, item)) for item in self.items]
        # As long as the longest right answer: what follows is no answer to this question.
        n_new = max(len(item["response_ids"]) for item in self.items)
        found = {}
        for kind, rollouts in exchanged(own, questions.separator_ids).items():
            rows = [
                replace(p, ids=r.prompt + r.shared + r.bridge + opening)
                for p, r, opening in zip(prompts, rollouts, openings, strict=True)
            ]
            said = decode_rows(run, rows, questions, 1, 0.0, n_new)
            right = [
                questions.data.answer(tokenizer.decode([*opening, *tokens]), item) == item["gold"]
                for opening, (tokens,), item in zip(openings, said, self.items, strict=True)
            ]
            logprobs = answer_logprobs(run, self.config, rollouts)
            found[kind] = {"accuracy": float(np.mean(right)), "reward": float(logprobs.mean())}
        return found


def _opening(data: Any, item: Item) -> str:
    """How every answer of the data set begins: the response up to what is particular to the item.

    Given to the model, or after no rationale it would first write one.
    """
    text = data.response(item)
    return str(text.partition(item["groundtruth"].strip())[0].rstrip())
