"""The questions of LaTRO, SFT and the pre-experiment: data set -> prompts and answers, as tokens.

An item is a dict of what its data set's `read` gave and

    idx                     its number in the file
    queries, query_ids      the prompt, ready for the model: text and tokens
    responses, response_ids the right answer with the token that ends it
    groundtruth             the right answer as the data has it
    rationales              the reasoning people wrote, if the set has any
    gold                    the right answer as `answer` of the data set reads it

The names in the plural are LaTRO's published ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coconut.chat import end_of_turn, render, stop_tokens, uses_template
from coconut.config import RunConfig
from coconut.curriculum import Sample
from coconut.dataset import raise_all
from coconut.errors import UserError
from coconut.tokens import Tokenizer

Item = dict[str, Any]
DEBUG_ITEMS = {"train": 5_000, "validation": 32, "test": 32}
"""What a debug run reads, as in Coconut's runs."""


class Questions:
    """A data set as a run asks it. Raises UserError for what the run wants and the set lacks."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        from data import latro

        assert config.dataset_name is not None, "checked with the configuration"
        name, self.n_shots = latro.parse_name(config.dataset_name)
        self.config, self.tokenizer = config, tokenizer
        self.data = latro.load(name)
        known = getattr(self.data, "N_SHOTS", 0)
        if self.n_shots not in (0, known):
            has = f"{known} worked examples ({name}_{known}shot)" if known else "none"
            raise UserError(
                config.dataset_name, f"asks for {self.n_shots} worked examples; {name} has {has}"
            )
        self.uses_template = uses_template(config, tokenizer)
        self.end_id = end_of_turn(tokenizer, self.uses_template)
        self.stop_ids = stop_tokens(config, tokenizer, self.uses_template)

    # ---- reading

    def items(self, split: str) -> list[Item]:
        """The items of "train", "validation" or "test", prepared. Raises UserError."""
        path, part = self._source(split)
        items = list(enumerate(self._read(path)))
        if part != "all":
            held = self._held_out([item for _, item in items], path)
            items = [(i, item) for i, item in items if (i in held) == (part == "held out")]
        if self.config.debug:
            items = items[: DEBUG_ITEMS[split]]
        return self._prepared(items, path)

    def path(self, split: str) -> str:
        """The file a split is read from."""
        return self._source(split)[0]

    def _source(self, split: str) -> tuple[str, str]:
        """(file, which part of it: all, held out, kept) of a split."""
        config, files = self.config, self.data.FILES
        train = config.train_path or files["train"]
        validation = config.val_path
        if config.train_path is None:
            validation = validation or files.get("validation")
        if split == "test":
            return config.val_path or files["test"], "all"
        if split == "validation":
            return (train, "held out") if validation is None else (validation, "all")
        return train, "kept" if validation is None else "all"

    def _read(self, path: str) -> list[Item]:
        if not Path(path).exists():
            raise UserError(path, f"no such file; {self.data.HOW}")
        items = self.data.read(path)
        if not items:
            raise UserError(path, "holds no items")
        return items

    def _held_out(self, items: Sequence[Item], path: str) -> set[int]:
        """Numbers of the items that validation takes out of train.

        Those whose question has the smallest hash, so the choice depends on the split_seed alone:
        not on the order of the file, not on the run's seed.
        """
        n = self.config.validation_items
        if n >= len(items):
            raise UserError(
                path, f"has {len(items)} items: lower validation_items ({n}), or give val_path"
            )
        seed = self.config.split_seed
        hashes = [hashlib.sha256(f"{seed} {i['question']}".encode()).digest() for i in items]
        last = sorted(hashes)[n - 1]
        # <=: the same question again goes to the same side.
        return {i for i, h in enumerate(hashes) if h <= last}

    # ---- asking

    def _prepared(self, numbered: Sequence[tuple[int, Item]], path: str) -> list[Item]:
        tokenizer, data = self.tokenizer, self.data
        end = tokenizer.spelled(self.end_id)
        prepared, problems = [], []
        for idx, item in numbered:
            text = data.response(item)
            gold = data.answer(text, item)
            if not gold:
                problems.append(f"item {idx}: its answer {item['groundtruth']!r} cannot be read")
                continue
            query = self._asked(item)
            try:
                query_ids = self._query_ids(query, item)
            except UserError as error:
                problems.append(f"item {idx}: {'; '.join(error.problems)}")
                continue
            prepared.append(
                item
                | {
                    "idx": idx,
                    "queries": query,
                    "query_ids": query_ids,
                    "responses": text + end,
                    "response_ids": [*tokenizer.encode(text), self.end_id],
                    "gold": gold,
                }
            )
        raise_all(path, problems)
        return prepared

    def _asked(self, item: Item) -> str:
        """The prompt of an item: wording, worked examples, chat template."""
        text = self._wording()(item, self.uses_template)
        if self.n_shots:
            text = f"{self.data.SHOTS.strip()}\n{text}"
        if self.uses_template:
            return render(self.tokenizer, [{"role": "user", "content": text}])
        return text

    def _wording(self) -> Callable[[Item, bool], str]:
        kind = self.config.prompt
        if kind == "auto":
            kind = "sft" if self.config.method == "sft" else "reason"
        data = self.data
        sft = getattr(data, "sft_prompt", data.prompt)
        return {
            "reason": data.prompt,
            "sft": sft,
            "sft_published": getattr(data, "sft_published_prompt", sft),
        }[kind]

    def _query_ids(self, query: str, item: Item) -> list[int]:
        if not self.uses_template:
            return self.tokenizer.encode_question(query)
        # Text never makes a control token; in a filled template it could.
        wording = self._wording()(item, True)
        if any(map(self.tokenizer.is_control, self.tokenizer.encode_filled(wording))):
            raise UserError("text", "spells a control token of the tokenizer; take it out")
        return self.tokenizer.encode_filled(query)

    # ---- supervised fine-tuning

    def samples(self, items: Sequence[Item]) -> list[Sample]:
        """What SFT trains on: the prompt, and the assistant's text with its end as the targets."""
        return [
            Sample(i["idx"], i["query_ids"], [], [*self._assistant(i), self.end_id]) for i in items
        ]

    def _assistant(self, item: Item) -> list[int]:
        own = getattr(self.data, "sft_response", None)
        text = item.get("rationales", "") + self.data.response(item) if own is None else own(item)
        return self.tokenizer.encode(text)
