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

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coconut.batches.curriculum import Row, Sample, markers_of
from coconut.batches.dataset import raise_all
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.files import here_or_shipped
from coconut.text.chat import end_of_turn, render, stop_tokens, uses_template
from coconut.text.tokenizer import Tokenizer

Item = dict[str, Any]
DEBUG_ITEMS = {"train": 5_000, "validation": 32, "test": 32}
"""What a debug run reads, as in Coconut's runs."""
SANITY_ITEMS = 1_000
"""What is left of every split with sanity_check."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class DataSet:
    """The files of a data set, split as a run wants them. Raises UserError for what it lacks."""

    def __init__(self, config: RunConfig):
        from coconut.tasks import questions as latro

        assert config.dataset_name is not None, "checked with the configuration"
        name, self.n_shots = latro.parse_name(config.dataset_name)
        self.config, self.data = config, latro.load(name)
        known = getattr(self.data, "N_SHOTS", 0)
        if self.n_shots not in (0, known):
            has = f"{known} worked examples ({name}_{known}shot)" if known else "none"
            raise UserError(
                config.dataset_name, f"asks for {self.n_shots} worked examples; {name} has {has}"
            )

    def numbered(self, split: str) -> list[tuple[int, Item]]:
        """(number in the file, item) of "train", "validation" or "test". Raises UserError."""
        path, part = self._source(split)
        if split != "test" and Path(path).resolve() == Path(self.path("test")).resolve():
            raise UserError(path, f"is the test split; another file has to be the {split} split")
        items = list(enumerate(self._read(path)))
        if split == "validation" and part == "all" and not self.config.only_eval:
            self._check_apart(items, path)
        if part != "all":
            held = self._held_out([item for _, item in items], path)
            items = [(i, item) for i, item in items if (i in held) == (part == "held out")]
        if getattr(self.config, "sanity_check", False):
            items = items[:SANITY_ITEMS]
        return items[: DEBUG_ITEMS[split]] if self.config.debug else items

    def path(self, split: str) -> str:
        """The file a split is read from."""
        return self._source(split)[0]

    @property
    def is_held_out(self) -> bool:
        """Whether the validation split is taken out of train."""
        return self._source("validation")[1] == "held out"

    def _source(self, split: str) -> tuple[str, str]:
        """(file, which part of it: all, held out, kept) of a split."""
        config = self.config
        files = {part: here_or_shipped(path) for part, path in self.data.FILES.items()}
        if split == "test":
            return config.test_path or files["test"], "all"
        train = config.train_path or files["train"]
        validation = config.val_path
        if config.train_path is None:
            validation = validation or files.get("validation")
        if split == "validation":
            return (train, "held out") if validation is None else (validation, "all")
        # A pre-experiment trains nothing, so nothing has to be held out.
        kept = validation is None and config.method != "preexperiment"
        return train, "kept" if kept else "all"

    def _read(self, path: str) -> list[Item]:
        if not Path(path).exists():
            raise UserError(path, f"no such file; {self.data.HOW}")
        items = self.data.read(path)
        if not items:
            raise UserError(path, "holds no items; is it the right file?")
        problems = [f"item {i}: {text}" for i, item in enumerate(items) for text in _wrong(item)]
        raise_all(path, problems)
        return items

    def _check_apart(self, items: Sequence[tuple[int, Item]], path: str) -> None:
        """Raise UserError if items of validation, read from `path`, are trained on."""
        train = self.path("train")
        remedy = "name another file, or leave val_path out to hold validation_items of train out"
        if Path(path).resolve() == Path(train).resolve():
            raise UserError(path, f"is the train split too; {remedy}")
        # As they are asked: options belong to a question.
        trained = {self.data.prompt(item, False): i for i, item in enumerate(self._read(train))}
        asked = ((i, trained.get(self.data.prompt(item, False))) for i, item in items)
        shared = [(i, j) for i, j in asked if j is not None]
        if shared:
            i, j = shared[0]
            raise UserError(
                path,
                f"{len(shared)} of its questions are trained on too, the first is item {i}, which"
                f" is item {j} of {train}; take them out of one of the two files",
            )

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


def _wrong(item: Item) -> list[str]:
    """What an item lacks that every data set's `read` has to give."""
    if not isinstance(item, dict):
        return [f"must be a dict with question and groundtruth, got {type(item).__name__}"]
    found = []
    for name, if_empty in _IF_EMPTY.items():
        text = item.get(name)
        if name == "rationales" and text is None:
            continue
        if not isinstance(text, str):
            found.append(f"{name} must be text, got {type(text).__name__}")
        elif not text.strip():
            found.append(if_empty)
    for name, value in item.items():
        # Text that holds all texts of the value, those of lists and dicts too.
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)):
            found.append(f"{name} holds a lone surrogate, which no tokenizer can encode; repair it")
    return found


_IF_EMPTY = {
    "question": "its question is empty; write one, or take the item out",
    "groundtruth": "has no answer; add one, or take the item out",
    "rationales": "its rationale is empty; write one, or leave it out of the item",
}


class Questions(DataSet):
    """A data set as a run asks it: items with prompts and answers as tokens."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        super().__init__(config)
        self.tokenizer = tokenizer
        self.uses_template = uses_template(config, tokenizer)
        self.end_id = end_of_turn(tokenizer, self.uses_template)
        self.stop_ids = stop_tokens(config, tokenizer, self.uses_template)
        self.n_latents = getattr(config, "latro_latents", 0)
        markers = markers_of(tokenizer)
        self.thoughts: list[int] = []
        if markers and self.n_latents:
            self.thoughts = [markers.start, *[markers.latent] * self.n_latents, markers.end]

    def items(self, split: str) -> list[Item]:
        """The items of "train", "validation" or "test", prepared. Raises UserError."""
        return self._prepared(self.numbered(split), self.path(split))

    # ---- asking

    def prompt(self, item: Item) -> Row:
        """The prompt's tokens, thoughts behind them if the run has any."""
        ids = item["query_ids"]
        first = len(ids) + 1 if self.thoughts else -1
        return Row(item["idx"], [*ids, *self.thoughts], None, first, self.n_latents)

    def judge(self, output: str, item: Item) -> dict[str, Any]:
        """The answer of an output, and whether it is right, by both rules and by answer_rule's."""
        said = self.data.answer(output, item)
        corrected = said == item["gold"]
        rule = getattr(self.data, "released", None)
        released = corrected if rule is None else rule(output, item)
        return {
            "answer": said,
            "gold": item["gold"],
            "correct": corrected if self.config.answer_rule == "corrected" else released,
            "correct_corrected": corrected,
            "correct_released": released,
        }

    def _prepared(self, numbered: Sequence[tuple[int, Item]], path: str) -> list[Item]:
        tokenizer, data = self.tokenizer, self.data
        end = tokenizer.spelled(self.end_id)
        prepared, problems = [], []
        for idx, item in numbered:
            text = data.response(item)
            gold = data.answer(text, item)
            if not gold:
                problems.append(
                    f"item {idx}: its answer {item['groundtruth']!r} cannot be read; correct it, or"
                    " take the item out"
                )
                continue
            query = self._asked(item)
            try:
                query_ids = self._query_ids(query, item)
                response_ids = [*tokenizer.encode(text), self.end_id]
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
                    "response_ids": response_ids,
                    "gold": gold,
                }
            )
        raise_all(path, problems)
        return prepared

    def _asked(self, item: Item) -> str:
        """The prompt of an item: wording, worked examples, chat template."""
        text = self._asks()(item, self.uses_template)
        if self.n_shots:
            text = f"{self.data.SHOTS.strip()}\n{text}"
        if self.uses_template:
            return render(self.tokenizer, [{"role": "user", "content": text}])
        return text

    @property
    def wording(self) -> str:
        """Which wording asks, auto resolved."""
        kind = self.config.prompt
        return kind if kind != "auto" else "sft" if self.config.method == "sft" else "reason"

    def _asks(self) -> Callable[[Item, bool], str]:
        data = self.data
        sft = getattr(data, "sft_prompt", data.prompt)
        return {
            "reason": data.prompt,
            "sft": sft,
            "sft_published": getattr(data, "sft_published_prompt", sft),
        }[self.wording]

    def _query_ids(self, query: str, item: Item) -> list[int]:
        wording = self._asks()(item, self.uses_template)
        if not wording.strip():
            raise UserError("text", "its prompt is empty; correct prompt of the data set")
        if not self.uses_template:
            return self.tokenizer.encode_question(query)
        # Text never makes a control token; in a filled template it could.
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
        if own is not None:
            return self.tokenizer.encode(own(item))
        # A line break between: what LaTRO puts there too (its key separator).
        parts = [item.get("rationales", "").rstrip(), self.data.response(item)]
        return self.tokenizer.encode("\n".join(filter(None, parts)))
