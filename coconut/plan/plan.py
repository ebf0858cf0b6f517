"""What --check prints: a run's stages, lengths, size and memory, without building a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.batches.curriculum import IGNORED, Row, evaluation_stage, stage_of_epoch
from coconut.checkpoints.adapters import in_words, n_trained
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.config.methods import DATASET_METHODS
from coconut.plan.memory import Shape, evaluation_bytes, too_large, training_bytes
from coconut.plan.rows import Data, alike, check_fit, prompts_of, read_data, rows_of
from coconut.plan.unbuilt import Model, find_model, to_fetch
from coconut.reporting.console import Console
from coconut.run.changed import changed_keys, changed_lines
from coconut.run.saving import newest_checkpoint, progress_of
from coconut.run.start import processes_in_words


def print_plan(config: RunConfig, twin: str, n_processes: int = 1) -> list[str]:
    """Check everything that needs no weights and print the plan of the run.

    n_processes: how many the run is spread over. Builds no model, opens no framework, writes
    nothing but what describes a model of the hub into the hub's cache; downloads no weights.
    Returns what was said of batches that are too large for this machine. Raises UserError.
    """
    newest = None if config.only_eval else newest_checkpoint(config.run_dir)
    changed = changed_keys(config, newest)
    model = find_model(config, newest, twin)
    shape = model.shape
    train, val = read_data(config, model)
    if train is None:
        stage, why = evaluation_stage(config, model.coconut)
        stages = [stage]
    else:
        epochs = range(config.resume, config.num_epochs)
        stages = sorted({stage_of_epoch(config, epoch) for epoch in epochs})
    prompts = {stage: prompts_of(config, val, stage, model) for stage in stages}
    if shape and model.tokenizer:
        check_fit(config, train, val, stages, prompts, shape.n_positions)

    console = Console()
    console.say(_headline(config, twin, model))
    for line in filter(None, (model.note, *config.notes, to_fetch(config, newest))):
        console.say(line)
    if train is None and config.method in DATASET_METHODS:
        console.say(f"evaluates {model.name} once on {config.split}: {asked_for(config)}")
    elif train is None:
        console.say(f"evaluates {model.name} once, at stage {stage} ({why})")
    rows = []
    if train is not None:
        for line in (resume_in_words(config, newest), *changed_lines(changed)):
            console.say(line)
        _say_adapter(console, model)
        # Of an official file that is not there yet the notes say how it comes.
        rows = _say_stages(console, config, train, model, n_processes) if train.samples else []
    if val.samples:
        _say_evaluation(console, val, prompts, model)
    large = []
    if shape and model.tokenizer and val.samples:
        large = _say_memory(console, config, shape, rows, prompts, model.source)
    console.say("checked: no model was built, no weights were downloaded, nothing was written")
    return large


def asked_for(config: RunConfig) -> str:
    """What an evaluation on a data set computes, in words."""
    if config.method == "preexperiment":
        return "the answers' log-likelihood without and with the written rationales"
    how = "greedy answers" if config.temperature == 0 else f"answers at T = {config.temperature}"
    if config.maj_k:
        how += f", the majority of {config.maj_k} at T = {config.maj_temperature}"
    checked = ", and again after exchanged rationales"
    return how + (checked if getattr(config, "rationale_check", False) else "")


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
    for first, last in alike(config):
        rows, dropped = rows_of(config, train, first, model)
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
) -> list[str]:
    """Memory of batches of the longest rows, and whether an answer has room behind its question.

    Returns a line for each batch that this machine has no room for; they are said too.
    """
    table, large = [], []
    if rows:
        length = max(len(row.ids) for row in rows)
        length = -(-length // config.pad_multiple) * config.pad_multiple
        targets = max(sum(label != IGNORED for label in row.labels or ()) for row in rows)
        n_rows = config.batch_size_training
        size = training_bytes(
            shape, n_rows, length, n_rows * targets, config, source, behind_latents(rows)
        )
        table.append(("training", n_rows, length, f"{size / 1e9:.2f}"))
        large.append(
            too_large(
                size,
                "batch_size_training, with more gradient_accumulation_steps:"
                " the same update, or set gradient_checkpointing: True",
            )
        )
    questions = [len(row.ids) for asked in prompts.values() for row in asked]
    longest, n_rows = max(questions), min(config.eval_batch_size, len(prompts[min(prompts)]))
    size = evaluation_bytes(shape, n_rows, longest, config.new_tokens, config.bf16)
    table.append(("evaluation", n_rows, longest, f"{size / 1e9:.2f}"))
    title = "estimated peak memory of a batch of the longest rows:"
    console.table(title, ("in", "rows", "tokens", "GB"), table)
    large.append(too_large(size, "eval_batch_size"))
    found = list(filter(None, large))
    for line in found:
        console.say(line)
    room = shape.n_positions - longest
    if room < config.new_tokens and config.method != "preexperiment":
        console.say(
            f"note: the longest question leaves {room} of {shape.n_positions} positions, fewer than"
            f" the {config.new_tokens} new tokens allowed: its answer is cut there, and counted"
        )
    return found


def behind_latents(rows: Sequence[Row]) -> int:
    """The most columns that a row has from its first latent on; 0 if no row has one."""
    return max((len(row.ids) - row.first_latent for row in rows if row.n_latents), default=0)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _three(lengths: Sequence[int], known: bool) -> tuple[Any, Any, Any]:
    if not known:
        return "?", "?", "?"
    return min(lengths), round(sum(lengths) / len(lengths)), max(lengths)
