"""What --check prints: a run's stages, lengths, size and memory, without building a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from coconut.batches.curriculum import (
    IGNORED,
    Markers,
    Row,
    Sample,
    draw_stage,
    evaluation_stage,
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
from coconut.checkpoints.adapters import check_twin, in_words, n_trained
from coconut.checkpoints.hub import HubUnreachable, missing_weights
from coconut.checkpoints.source import Source, open_source
from coconut.config.keys import DATASET_METHODS, WITH_LATENTS, RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.plan.memory import Shape, evaluation_bytes, frozen_bytes, shape_of, training_bytes
from coconut.reporting.console import Console
from coconut.run.latro.preexperiment import scored
from coconut.run.saving import newest_checkpoint, progress_of
from coconut.run.start import processes_in_words
from coconut.text.opening import load_tokenizer
from coconut.text.tokenizer import Tokenizer

SPREAD, LONGEST = 1_000, 200
"""Of a larger data set, this many evenly spread and this many longest items are tokenised."""

_GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
PUBLISHED_SHAPES = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""config.json of the published GPT-2 models; their hub names may carry `openai-community/`."""


@dataclass(frozen=True)
class Model:
    """What is known of a run's model. None where it has to be downloaded first."""

    name: str
    shape: Shape | None
    tokenizer: Tokenizer | None
    coconut: dict[str, Any] | None
    note: str = ""
    source: Source | None = None


@dataclass(frozen=True)
class Data:
    """A data set, tokenised in part. n_items: all of it. Without a tokenizer parts are empty."""

    where: str
    n_items: int
    samples: list[Sample]


def print_plan(config: RunConfig, twin: str, n_processes: int = 1) -> None:
    """Check everything that needs no weights and print the plan of the run.

    n_processes: how many the run is spread over. Builds no model, opens no framework, writes
    nothing but what describes a model of the hub into the hub's cache; downloads no weights.
    Raises UserError.
    """
    newest = None if config.only_eval else newest_checkpoint(config.run_dir)
    model = find_model(config, newest)
    shape = model.shape
    if model.source is not None:
        check_twin(twin, config.adapter, model.source.config, model.name)
    read = _data_set if config.method in DATASET_METHODS else _steps
    train, val = read(config, model)
    if train is None:
        stage, why = evaluation_stage(config, model.coconut)
        stages = [stage]
    else:
        epochs = range(config.resume, config.num_epochs)
        stages = sorted({stage_of_epoch(config, epoch) for epoch in epochs})
    prompts = {stage: _questions(config, val, stage, model) for stage in stages}
    if shape and model.tokenizer:
        _check_fit(config, train, val, stages, prompts, shape.n_positions)

    console = Console()
    console.say(_headline(config, twin, model))
    for line in filter(None, (model.note, to_fetch(config, newest))):
        console.say(line)
    if train is None and config.method in DATASET_METHODS:
        console.say(f"evaluates {model.name} once on {config.split}: {asked_for(config)}")
    elif train is None:
        console.say(f"evaluates {model.name} once, at stage {stage} ({why})")
    rows = []
    if train is not None:
        console.say(resume_in_words(config, newest))
        _say_adapter(console, model)
        rows = _say_stages(console, config, train, model, n_processes)
    _say_evaluation(console, val, prompts, model)
    if shape and model.tokenizer:
        _say_memory(console, config, shape, rows, prompts, model.source)
    console.say("checked: no model was built, no weights were downloaded, nothing was written")


def _say_adapter(console: Console, model: Model) -> None:
    """How much of the model is trained, where that is not all of it."""
    if model.source is None or model.source.adapter is None or model.shape is None:
        return
    adapter, config = model.source.adapter, model.source.config
    n = n_trained(config, adapter.lora, len(adapter.rows))
    frozen = model.shape.n_params
    quantized = config.get("quantization") or {}
    bits = adapter.lora.quantize or quantized.get("bits")
    stored = f" in {bits} bits" if bits else ""
    console.say(
        f"trains {n:,} parameters ({100 * n / frozen:.2f} %) beside {frozen:,} frozen ones{stored}:"
        f" {in_words(adapter, config)}"
    )


def resume_in_words(config: RunConfig, newest: Path | None) -> str:
    """What the run starts from and where in its schedule. newest: its own last checkpoint."""
    if newest is not None:
        epoch, update = progress_of(newest)
        if epoch >= config.num_epochs:
            return (
                f"{newest} has all {config.num_epochs} epochs behind it: nothing is left to train;"
                " raise num_epochs, or choose another name"
            )
        done = f"{epoch} of {config.num_epochs} epochs"
        done += f" and {update} updates of the next" if update else ""
        return (
            f"continues {newest} with {done} done: at epoch {epoch + 1}, stage"
            f" {stage_of_epoch(config, epoch)}; keys resume and load_model_path are not read"
        )
    source = config.load_model_path or config.model_id
    weights = f"the weights of {source}" if source else f"random weights, seed {config.seed}"
    if not config.resume:
        return f"starts from {weights} at epoch 1, stage {stage_of_epoch(config, 0)}"
    return (
        f"resume {config.resume}: starts from {weights} at epoch {config.resume + 1}, stage"
        f" {stage_of_epoch(config, config.resume)}; the first {config.resume} epochs of the"
        " schedule are skipped, no file of theirs is read"
    )


# ---- the model


def find_model(config: RunConfig, newest: Path | None) -> Model:
    """The model of a run, described without its weights. Raises UserError."""
    name = str(newest or config.load_model_path or config.model_id or config.model_config_path)
    try:
        opened = open_source(config, newest, with_weights=False)
    except HubUnreachable:
        return _not_downloaded(config, name)
    source = opened.source
    where, rows = str(config.model_config_path), 0
    if source.directory is not None:
        where, rows = str(source.directory / "config.json"), source.config["vocab_size"]
    shape = shape_of(source.config, max(source.vocab_size, rows), where)
    return Model(name, shape, opened.tokenizer, opened.coconut, source=source)


def _not_downloaded(config: RunConfig, name: str) -> Model:
    known = PUBLISHED_SHAPES.get(name.removeprefix("openai-community/"))
    which = config.tokenizer or ("gpt2" if known else None)
    note = f"{name}: not downloaded yet, and the hub cannot be reached; "
    note += "published shape" if known else "its size is unknown until it is"
    tokenizer = None
    if which is None:
        note += ", and so are its tokens"
    else:
        try:
            tokenizer = load_tokenizer(which)
        except UserError as error:
            # The vocabulary is fetched with the model; all that needs no tokens can be checked.
            if which != "gpt2":
                raise
            note += f"; lengths are unknown: {error}"
    if tokenizer is not None and config.method in WITH_LATENTS:
        tokenizer = tokenizer.with_latents()
    shape = None
    if known:
        n_markers = 3 if config.method in WITH_LATENTS else 0
        rows = known["vocab_size"] + n_markers if tokenizer is None else len(tokenizer)
        shape = shape_of(known, max(known["vocab_size"], rows), name)
    return Model(name, shape, tokenizer, None, note)


def to_fetch(config: RunConfig, newest: Path | None) -> str:
    """What of a model of the hub a run would still download, in words; empty if nothing."""
    name = config.model_id
    if newest is not None or config.load_model_path or not name or os.path.isdir(name):
        return ""
    missing = missing_weights(name, config.model_revision)
    if missing == []:
        return ""
    names = "its description, tokenizer and weights" if missing is None else ", ".join(missing)
    return f"a run would fetch from the hub: {name}: {names}"


# ---- the data


def _steps(config: RunConfig, model: Model) -> tuple[Data | None, Data]:
    """(training data, what is asked) of a method over questions with steps."""
    assert config.val_path is not None, "checked with the configuration"
    val_items = read_items(config.val_path)
    if config.debug:
        val_items = val_items[:DEBUG_VALIDATION]
    val = _tokenised(config.val_path, val_items, len(val_items), model.tokenizer)
    return None if config.only_eval else _training_data(config, model), val


def _data_set(config: RunConfig, model: Model) -> tuple[Data | None, Data]:
    """(training data, what is asked) of a method over a data set of data/latro."""

    def read(split: str) -> Data:
        if model.tokenizer is None:
            unread = DataSet(config)
            numbers = [i for i, _ in unread.numbered(split)]
            samples = [Sample(i, [], [], []) for i in numbers]
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


def asked_for(config: RunConfig) -> str:
    """What an evaluation on a data set computes, in words."""
    if config.method == "preexperiment":
        return "the answers' log-likelihood without and with the written rationales"
    how = "greedy answers" if config.temperature == 0 else f"answers at T = {config.temperature}"
    if config.maj_k:
        how += f", the majority of {config.maj_k} at T = {config.maj_temperature}"
    checked = ", and again after exchanged rationales"
    return how + (checked if getattr(config, "rationale_check", False) else "")


def _training_data(config: RunConfig, model: Model) -> Data:
    training = TrainingData(config, model.tokenizer)
    items, where, total = training.preview(SPREAD)
    return _tokenised(where, items[:total], total, model.tokenizer)


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


def _check_fit(
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


def _questions(config: RunConfig, val: Data, stage: int, model: Model) -> list[Row]:
    markers = _markers(config, model)
    return [question_row(config, s, stage, markers, config.n_latents) for s in val.samples]


# ---- what is said


def _headline(config: RunConfig, twin: str, model: Model) -> str:
    size = f" {model.shape.n_params:,} params" if model.shape else ""
    dtype = "bfloat16" if config.bf16 else "float32"
    return (
        f"{twin} | {model.name}{size} | {dtype} | run {config.name} | method {config.method}"
        f" | seed {config.seed}"
    )


def _say_stages(
    console: Console, config: RunConfig, train: Data, model: Model, n_processes: int
) -> list[Row]:
    """The table of stages. Returns the rows it was made from."""
    per_update = config.batch_size_training * config.gradient_accumulation_steps * n_processes
    n_updates = -(-train.n_items // per_update)
    removed = "tokens removed" if config.method == "icot" else "steps dropped"
    has_tokens = model.tokenizer is not None
    table, all_rows = [], []
    for first, last in _groups(config):
        rows, dropped = _rows(config, train, first, _markers(config, model))
        all_rows += rows
        table.append(
            (
                _span([first + 1, last + 1]),
                _span([stage_of_epoch(config, first), stage_of_epoch(config, last)]),
                _span(dropped) if has_tokens or config.method != "icot" else "?",
                _span([row.n_latents for row in rows]),
                train.n_items,
                n_updates * (last - first + 1),
                *_three([len(row.ids) for row in rows], has_tokens),
            )
        )
    columns = ("epochs", "stage", removed, "latents", "examples", "updates")
    console.table(f"training on {train.where}:", (*columns, "tokens min", "mean", "max"), table)
    _say_sample(console, train)
    console.say(processes_in_words(config, n_processes))
    return all_rows


def _groups(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(first epoch, last epoch) of epochs that are alike, counted from 0."""

    def kind(epoch: int) -> int:
        if config.method == "icot":
            return epoch  # removes more with every epoch
        stage = stage_of_epoch(config, epoch)
        # Stages beyond the last differ only in how often an earlier one is drawn.
        return stage if config.stage_mixing != "none" else min(stage, n_stages(config))

    for _, epochs in groupby(range(config.resume, config.num_epochs), kind):
        first, *rest = epochs
        yield first, rest[-1] if rest else first


def _rows(
    config: RunConfig, train: Data, epoch: int, markers: Markers | None
) -> tuple[list[Row], list[int]]:
    """The rows of an epoch, and what each lost: steps, or for iCoT tokens of its chain."""
    rows, dropped = [], []
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


def _say_evaluation(
    console: Console, val: Data, prompts: dict[int, list[Row]], model: Model
) -> None:
    # The questions of the stages between lie between those of the first and the last.
    ends = {stage: prompts[stage] for stage in (min(prompts), max(prompts))}
    table = [
        (
            stage,
            _span([row.n_latents for row in rows]),
            val.n_items,
            *_three([len(row.ids) for row in rows], model.tokenizer is not None),
        )
        for stage, rows in ends.items()
    ]
    columns = ("stage", "latents", "questions", "tokens min", "mean", "max")
    console.table(f"evaluation on {val.where}:", columns, table)
    _say_sample(console, val)


def _say_sample(console: Console, data: Data) -> None:
    if len(data.samples) < data.n_items:
        console.say(f"  (from a sample of {len(data.samples):,} of {data.n_items:,} items)")


def _say_memory(
    console: Console,
    config: RunConfig,
    shape: Shape,
    rows: list[Row],
    prompts: dict[int, list[Row]],
    source: Source | None,
) -> None:
    """Memory of batches of the longest rows, and whether an answer has room behind its question."""
    table = []
    if rows:
        length = max(len(row.ids) for row in rows)
        length = -(-length // config.pad_multiple) * config.pad_multiple
        targets = max(sum(label != IGNORED for label in row.labels or ()) for row in rows)
        n_rows = config.batch_size_training
        options = (config.bf16, config.gradient_checkpointing)
        size = training_bytes(shape, n_rows, length, n_rows * targets, *options)
        if source is not None and source.adapter is not None:
            size -= frozen_bytes(shape, source, config.bf16)
        table.append(("training", n_rows, length, f"{size / 1e9:.2f}"))
    questions = [len(row.ids) for asked in prompts.values() for row in asked]
    longest, n_rows = max(questions), min(config.eval_batch_size, len(prompts[min(prompts)]))
    size = evaluation_bytes(shape, n_rows, longest, config.new_tokens, config.bf16)
    table.append(("evaluation", n_rows, longest, f"{size / 1e9:.2f}"))
    title = "estimated peak memory of a batch of the longest rows:"
    console.table(title, ("in", "rows", "tokens", "GB"), table)
    room = shape.n_positions - longest
    if room < config.new_tokens and config.method != "preexperiment":
        name = "response_length" if config.method in DATASET_METHODS else "max_new_tokens"
        console.say(
            f"note: the longest question leaves {room} of {shape.n_positions} positions, fewer"
            f" than the {config.new_tokens} new tokens allowed; set {name}: {room}"
        )


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _three(lengths: Sequence[int], known: bool) -> tuple[Any, Any, Any]:
    if not known:
        return "?", "?", "?"
    return min(lengths), round(sum(lengths) / len(lengths)), max(lengths)
