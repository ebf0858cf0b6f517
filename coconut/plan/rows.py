"""The rows that a run's data becomes: how many, how long, and what each of them lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from coconut.batches.curriculum import (
    Markers,
    Row,
    Sample,
    draw_stage,
    item_rng,
    longest_row,
    markers_of,
    mixed_stage,
    n_stages,
    plan,
    question_row,
    stage_of_epoch,
    training_row,
)
from coconut.batches.dataset import check_lengths, read_items, tokenize
from coconut.batches.questions import DataSet, Questions
from coconut.batches.training_data import DEBUG_VALIDATION, TrainingData
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.config.methods import DATASET_METHODS, WITH_LATENTS
from coconut.plan.unbuilt import Model
from coconut.run.latro.preexperiment import scored
from coconut.tasks.official import absent
from coconut.text.tokenizer import Tokenizer

SPREAD, LONGEST = 1_000, 200
"""Of a larger data set, this many evenly spread and this many longest items are tokenised."""


@dataclass(frozen=True)
class Data:
    """A data set, tokenised in part. n_items: all of it. Without a tokenizer parts are empty."""

    where: str
    n_items: int
    samples: list[Sample]


def read_data(config: RunConfig, model: Model) -> tuple[Data | None, Data]:
    """(training data, what is asked); no training data of a run that only evaluates."""
    if config.method in DATASET_METHODS:
        return _data_set(config, model)
    assert config.val_path is not None, "checked with the configuration"
    if n_absent := absent(config.val_path):
        val = Data(config.val_path, n_absent, [])
    else:
        val_items = read_items(config.val_path)
        if config.debug:
            val_items = val_items[:DEBUG_VALIDATION]
        val = _tokenised(config.val_path, val_items, len(val_items), model.tokenizer)
    if config.only_eval:
        return None, val
    if (n_absent := absent(config.train_path)) and not config.generate:
        return Data(str(config.train_path), n_absent, []), val
    items, where, total = TrainingData(config, model.tokenizer).preview(SPREAD)
    return _tokenised(where, items[:total], total, model.tokenizer), val


def _data_set(config: RunConfig, model: Model) -> tuple[Data | None, Data]:
    """The same of a method over a data set."""

    def read(split: str) -> Data:
        if model.tokenizer is None:
            unread = DataSet(config)
            samples = [Sample(i, [], [], []) for i, _ in unread.numbered(split)]
            return Data(unread.path(split), len(samples), samples)
        questions = Questions(config, model.tokenizer)
        items, path = questions.items(split), questions.path(split)
        if config.method == "sft":
            samples = questions.samples(items)
        elif isinstance(config, LatroConfig) and config.method == "preexperiment":
            samples = [Sample(i, ids, [], []) for i, ids in scored(config, questions, items)]
        else:
            samples = [Sample(i["idx"], questions.prompt(i).ids, [], []) for i in items]
        return Data(path, len(samples), samples)

    if config.only_eval:
        return None, read(config.split)
    if config.test_at_end:
        test = read("test")
        if model.tokenizer is not None and model.shape is not None:
            lengths = {sample.idx: len(sample.question) + 1 for sample in test.samples}
            check_lengths(lengths, model.shape.n_positions, test.where)
    return read("train"), read("validation")


def _tokenised(
    where: str, items: list[dict[str, Any]], n_items: int, tokenizer: Tokenizer | None
) -> Data:
    numbers = list(range(len(items)))
    if len(items) > SPREAD + LONGEST:
        spread = np.linspace(0, len(items) - 1, SPREAD).astype(int)
        sizes = np.array([len(i["question"]) + sum(map(len, i["steps"])) for i in items])
        numbers = sorted({*spread.tolist(), *np.argsort(sizes)[-LONGEST:].tolist()})
    chosen = [items[i] for i in numbers]
    if tokenizer is not None:
        return Data(where, n_items, tokenize(chosen, tokenizer, where, numbers))
    samples = [
        Sample(i, [], [[] for _ in item["steps"]], [], item.get("latents"))
        for i, item in zip(numbers, chosen, strict=True)
    ]
    return Data(where, n_items, samples)


def check_fit(
    config: RunConfig,
    train: Data | None,
    val: Data,
    stages: Sequence[int],
    prompts: dict[int, list[Row]],
    limit: int,
) -> None:
    """Raise UserError naming the items whose longest row has more tokens than positions."""
    lengths = [(val.where, row.idx, len(row.ids)) for rows in prompts.values() for row in rows]
    if train is not None:
        for data in (train, val):
            lengths += [
                (data.where, sample.idx, longest_row(config, sample, stages))
                for sample in data.samples
            ]
    for where in dict.fromkeys(where for where, _, _ in lengths):
        longest = {idx: n for place, idx, n in sorted(lengths) if place == where}
        check_lengths(longest, limit, where)


def _markers(config: RunConfig, model: Model) -> Markers | None:
    if model.tokenizer is not None:
        return markers_of(model.tokenizer)
    return Markers(0, 0, 0) if config.method in WITH_LATENTS else None


def prompts_of(config: RunConfig, val: Data, stage: int, model: Model) -> list[Row]:
    """What each question is at a stage."""
    markers = _markers(config, model)
    return [question_row(config, s, stage, markers, config.n_latents) for s in val.samples]


def alike(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(first epoch, last epoch) of epochs that have rows alike, counted from 0."""

    def kind(epoch: int) -> int:
        if config.method == "icot":
            return epoch  # removes more with every epoch
        stage = stage_of_epoch(config, epoch)
        # Stages beyond the last differ only in how often an earlier one is drawn.
        return stage if config.stage_mixing != "none" else min(stage, n_stages(config))

    for _, epochs in groupby(range(config.resume, config.num_epochs), kind):
        first, *rest = epochs
        yield first, rest[-1] if rest else first


def rows_of(
    config: RunConfig, train: Data, epoch: int, model: Model
) -> tuple[list[Row], list[int]]:
    """The rows of an epoch, and what each lost: steps, or for iCoT tokens of its chain."""
    rows, dropped, markers = [], [], _markers(config, model)
    stage = stage_of_epoch(config, epoch)
    for sample in train.samples:
        rng = item_rng(config.seed, epoch, sample.idx)
        drawn = mixed_stage(stage, rng) if config.stage_mixing == "batch" else stage
        drawn = draw_stage(config, drawn, len(sample.steps), rng)
        row = training_row(config, sample, drawn, markers, rng, float(epoch))
        rows.append(row)
        if config.method == "icot":
            whole = len(sample.question) + sum(map(len, sample.steps)) + len(sample.answer)
            dropped.append(whole - len(row.ids))
        elif sample.latents is not None and config.method in WITH_LATENTS:
            dropped.append(0)
        else:
            dropped.append(plan(config, drawn, len(sample.steps))[0])
    return rows, dropped
