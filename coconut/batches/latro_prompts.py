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
from coconut.errors import UserError, nearest


class Data(Questions):
    """The questions of a run, and where a rationale ends."""

    config: LatroConfig

    def __init__(self, config: LatroConfig, tokenizer: Any):
        super().__init__(config, tokenizer)
        by_text = config.stop_matching == "text"
        sequences = () if by_text else tuple(tuple(tokenizer.encode(s)) for s in config.stop_seqs)
        self.stops = Stops(
            self.stop_ids,
            tokenizer.decode,
            tuple(config.stop_seqs) if by_text else (),
            sequences,
        )
        self.separator_ids = tokenizer.encode(config.separator) if config.separator else []
        known = ["likelihood", "correct", *self.data.REWARDS]
        if unknown := [name for name in config.rewards if name not in known]:
            advice = nearest(unknown[0], known) or f"known: {', '.join(known)}"
            raise UserError(
                str(config.dataset_name),
                f"reward: {unknown[0]} is none, {advice}; docs/latro.md says how to add one",
            )

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The items trained on. Raises UserError if they are fewer than an update takes."""
        items, wanted = self.items("train"), self.config.n_prompts
        if len(items) < wanted:
            raise UserError(
                self.path("train"),
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

    def with_answer(self, r: Rollout, tokens: Sequence[int]) -> Rollout:
        """A rollout whose policy is held to all it wrote: rationale, stop, answer, end."""
        is_finished = bool(tokens) and tokens[-1] in self.stop_ids
        return replace(r, tail=list(tokens[len(r.shared) :]), is_finished=is_finished)

    def earned(self, r: Rollout, tokens: Sequence[int], item: dict[str, Any]) -> dict[str, float]:
        """What a rollout with its own answer earns by `correct` and the data set's own rewards."""
        judged = self.judge(self.tokenizer.decode(tokens), item)
        rationale = self.tokenizer.decode(tokens[: r.n_said])
        given = (item["queries"], rationale, judged["answer"], item["groundtruth"])
        named = self.config.rewards.keys() & self.data.REWARDS.keys()
        own = {name: float(self.data.REWARDS[name](*given)) for name in named}
        return {"correct": float(judged["correct"]), **own}

    def prompts_of(self, u: int) -> list[dict[str, Any]]:
        """The items of an update."""
        numbers = numbers_of(u, self.config.n_prompts, len(self.train), self.config.seed)
        return [self.train[i] for i in numbers]

    def written_rows(self) -> list[Row]:
        """What the warm start learns: items with a rationale, all behind the prompt labelled."""
        written = [i for i in self.train if i.get("rationales", "").strip()]
        if not written:
            raise UserError(
                self.path("train"),
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
                data.path(split),
                f"item {item['idx']}: question and answer{says} take {longest} of the model's"
                f" {n_positions} positions, which leaves {max(room, 0)} for a rationale of"
                f" {wanted} tokens; {lower}take the item out, or choose a model with more",
            )
    if data.config.warm_start_updates and "train" in splits:
        written = {row.idx: len(row.ids) for row in data.written_rows()}
        check_lengths(written, n_positions, data.path("train"))


def numbers_of(u: int, size: int, n: int, seed: int) -> list[int]:
    """Which of n items update u takes, `size` of them: shuffled passes, joined end to end."""
    first, last = u * size // n, ((u + 1) * size - 1) // n
    order = [i for e in range(first, last + 1) for i in epoch_order(n, seed, e)]
    start = u * size - first * n
    return order[start : start + size]
