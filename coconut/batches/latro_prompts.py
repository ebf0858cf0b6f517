"""The data of a LaTRO run: its items, their prompts, where a rationale ends, what fits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from coconut.batches.batch import epoch_order
from coconut.batches.curriculum import IGNORED, Row
from coconut.batches.dataset import check_lengths
from coconut.batches.questions import Questions
from coconut.batches.rollouts import Rollout, Stops, make_rollout
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError


class Data:
    """The items of a run, their prompts, and where a rationale ends."""

    def __init__(self, config: LatroConfig, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        self.questions = Questions(config, tokenizer)
        by_text = config.stop_matching == "text"
        sequences = () if by_text else tuple(tuple(tokenizer.encode(s)) for s in config.stop_seqs)
        self.stops = Stops(
            self.questions.stop_ids,
            tokenizer.decode,
            tuple(config.stop_seqs) if by_text else (),
            sequences,
        )
        self.separator_ids = tokenizer.encode(config.separator) if config.separator else []

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The items trained on. Raises UserError if they are fewer than an update takes."""
        items, wanted = self.items("train"), self.config.n_prompts
        if len(items) < wanted:
            raise UserError(
                self.questions.path("train"),
                f"{len(items)} prompts are fewer than the {wanted} of one update; lower"
                " batch_size_training or gradient_accumulation_steps, or raise rloo_k",
            )
        return items

    @cached_property
    def validation(self) -> list[dict[str, Any]]:
        """The items held out for choosing the best checkpoint."""
        return self.items("validation")

    @cached_property
    def test(self) -> list[dict[str, Any]]:
        """The items of the test split."""
        return self.items("test")

    @property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """The items of all splits that a training run reads."""
        read = {"train": self.train, "validation": self.validation}
        return read | ({"test": self.test} if self.config.test_at_end else {})

    def items(self, split: str) -> list[dict[str, Any]]:
        """The items of a split."""
        return self.questions.items(split)

    def prompt(self, item: dict[str, Any]) -> Row:
        """The prompt's tokens, thoughts behind them if the run has any."""
        return self.questions.prompt(item)

    def rollout(self, prompt: Row, tokens: Sequence[int], item: dict[str, Any]) -> Rollout:
        """A sampled rationale with the item's answer behind it."""
        config = self.config
        return make_rollout(
            prompt,
            tokens,
            item["response_ids"],
            self.stops,
            config.separator,
            self.tokenizer.encode,
            config.include_stop,
        )

    def prompts_of(self, u: int) -> list[dict[str, Any]]:
        """The items of an update: passes over train in shuffled order, joined end to end."""
        n, size = len(self.train), self.config.n_prompts
        first, stop = passes(u, size, n)
        order = [i for e in range(first, stop) for i in epoch_order(n, self.config.seed, e)]
        start = u * size - first * n
        return [self.train[i] for i in order[start : start + size]]

    def written_rows(self) -> list[Row]:
        """What the warm start learns: items with a rationale, all behind the prompt labelled."""
        written = [i for i in self.train if i.get("rationales", "").strip()]
        if not written:
            raise UserError(
                self.questions.path("train"),
                "warm_start_updates: no item has a rationale to learn from; set it to 0",
            )
        rows = []
        for item in written[: self.config.warm_start_items]:
            prompt = self.prompt(item)
            rationale = self.tokenizer.encode(item["rationales"].rstrip())
            target = [*rationale, *self.separator_ids, *item["response_ids"]]
            labels = [IGNORED] * len(prompt.ids) + target
            rows.append(replace(prompt, ids=[*prompt.ids, *target], labels=labels))
        return rows


def check_room(
    data: Data, splits: Mapping[str, Sequence[dict[str, Any]]], n_positions: int | None
) -> None:
    """Raise UserError unless prompt, rationale, separator and answer of all items have positions.

    Rationales as long as may be sampled, and those that a warm start reads. splits: items by the
    split they are of.
    """
    if n_positions is None:
        return
    for split, items in splits.items():
        needs = [len(data.prompt(item).ids) + len(item["response_ids"]) for item in items]
        longest, item = max(zip(needs, items, strict=True), key=lambda pair: pair[0])
        room = n_positions - longest - len(data.separator_ids)
        wanted = data.config.response_length
        if room < wanted:
            thoughts = data.config.latro_latents
            says = f" and {thoughts + 2} for its thoughts" if thoughts else ""
            lower = f"lower response_length from {wanted} to {room}, " if room > 0 else ""
            lower += "lower latro_latents, " if thoughts else ""
            raise UserError(
                data.questions.path(split),
                f"item {item['idx']}: question and answer{says} take {longest} of the model's"
                f" {n_positions} positions, which leaves {max(room, 0)} for a rationale of"
                f" {wanted} tokens; {lower}take the item out, or choose a model with more",
            )
    if data.config.warm_start_updates and "train" in splits:
        written = {row.idx: len(row.ids) for row in data.written_rows()}
        check_lengths(written, n_positions, data.questions.path("train"))


def passes(u: int, size: int, n: int) -> tuple[int, int]:
    """(first, behind the last) pass over n items that update u of `size` items reads from."""
    return u * size // n, ((u + 1) * size - 1) // n + 1
