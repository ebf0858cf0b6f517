"""What a LaTRO run will do, before it does: where it goes on from, its updates, what it needs."""

from dataclasses import replace

from coconut.batches.latro_prompts import Data, check_room
from coconut.batches.questions import DataSet
from coconut.checkpoints.adapters import n_trained
from coconut.config.latro_keys import LatroConfig
from coconut.plan.memory import Shape, evaluation_bytes, too_large, training_bytes
from coconut.plan.unbuilt import Model, find_model, to_fetch
from coconut.reporting.console import Console
from coconut.run.changed import changed_keys, changed_lines
from coconut.run.latro.resume import (
    plan_lines,
    reference_weights,
    resumed_from,
    whole_update,
)

SCORED = 512
"""Scored positions whose logits exist at one time: CHUNK of each twin's updates/latro.py."""


def print_latro_plan(config: LatroConfig, twin: str, n_processes: int = 1) -> list[str]:
    """Check everything that needs no weights and print the plan of a LaTRO run.

    n_processes: how many the run is spread over. Of a model of the hub only what describes it is
    fetched. Returns what was said of batches that are too large for this machine. Raises UserError.
    """
    given, last = config, resumed_from(config)
    config = whole_update(given, n_processes)
    warm = reference_weights(config, last)
    changed = changed_keys(given, last or warm)
    model, console = find_model(config, last, twin), Console()
    shape = model.shape
    large: list[str | None] = []
    size = f"{shape.n_params / 1e6:.1f}M params" if shape else "size unknown"
    lines = [f"{twin} | {model.name} | {size} | run {config.name} | latro, preset {config.preset}"]
    lines += filter(
        None, (model.note, *config.notes, to_fetch(config, last), *changed_lines(changed))
    )
    if model.tokenizer is None:
        lines += plan_lines(config, len(DataSet(config).numbered("train")), n_processes)
    else:
        data = Data(config, model.tokenizer)
        lines += plan_lines(config, len(data.train), n_processes)
        lines.append(
            f"evaluates {min(config.evaluation_items, len(data.validation)):,} of"
            f" {len(data.validation):,} items of {data.path('validation')}"
            + (" held out of train" if data.is_held_out else "")
        )
        if config.warm_start_updates and warm is None:
            lines.append(
                f"warm start: {config.warm_start_updates:,} updates of {config.warm_start_batch}"
                f" rows on {len(data.written_rows()):,} written rationales"
            )
        if config.latro_latents:
            lines.append(f"{config.latro_latents} thoughts before every rationale")
        if config.adapter:
            lines.append(f"trains {config.adapter.type} of rank {config.adapter.rank} alone")
        if config.sft_penalty:
            lines.append(
                f"sft_penalty {config.sft_penalty:g}: can teach the answers from the questions"
                " alone; if evaluations show the reward of shuffled rationales rise with the own,"
                " set it to 0 (docs/latro.md)"
            )
        if config.test_at_end:
            lines.append(
                f"the best checkpoint answers {len(data.test):,} items of {data.path('test')}, once"
            )
        longest = max(len(data.prompt(i).ids) + len(i["response_ids"]) for i in data.train)
        L = config.response_length
        lines.append(
            f"longest row {longest + L} tokens: prompt and answer {longest}, rationale {L}"
        )
        if shape is not None:
            check_room(data, data.splits, shape.n_positions)
            step, draw, said = _memory(config, model, shape, longest)
            lines += said
            large = [
                too_large(step, "batch_size_training"),
                too_large(draw, "rollout_batch_size"),
            ]
    found = list(filter(None, large))
    for line in [*lines, *found]:
        console.say(line)
    console.say("checked: no model was built, no weights were downloaded, nothing was written")
    return found


def _memory(
    config: LatroConfig, model: Model, shape: Shape, longest: int
) -> tuple[int, int, list[str]]:
    """(bytes of an update, of sampling, the lines that say what takes them).

    longest: tokens of a prompt and its answer. While rationales are drawn the moments and the
    reference wait beside the weights.
    """
    L, rows, source = config.response_length, config.batch_size_training, model.source
    trained = shape.n_params
    if source is not None and source.adapter is not None:
        trained = n_trained(source.config, source.adapter.lora, len(source.adapter.rows))
    reference = 4 * trained * (config.kl_coef > 0)
    row = longest + L
    update = training_bytes(shape, rows, row, min(rows * row, SCORED), config, source)
    bare, empty = replace(shape, n_params=0), training_bytes(shape, 0, 1, 0, config, source)
    # An update without rows: 4 bytes a trained number are its weight, 21 gradient and moments.
    weights = empty - 21 * trained
    activations = training_bytes(bare, rows, row, min(rows * row, SCORED), config)
    cache = evaluation_bytes(bare, config.rollout_batch_size, longest, L, config.bf16)
    step, draw = update + reference, weights + 8 * trained + reference + cache
    in_gb = [
        f"{name} {n / 1e9:.2f}"
        for name, n in (
            ("weights", weights),
            ("reference", reference),
            ("gradient", 4 * trained),
            ("moments", 8 * trained),
            (f"activations of {rows} rows", activations),
            (f"cache of {config.rollout_batch_size} rows", cache),
        )
    ]
    return (
        step,
        draw,
        [
            f"estimated memory in GB: {', '.join(in_gb)}",
            f"estimated peak memory: update {step / 1e9:.2f} GB, sampling {draw / 1e9:.2f} GB",
        ],
    )
