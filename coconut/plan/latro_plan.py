"""What a LaTRO run will do, before it does: where it goes on from, its updates, what it needs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from coconut.batches.latro_prompts import Data, check_room
from coconut.batches.questions import DataSet
from coconut.checkpoints import checkpoint
from coconut.checkpoints.adapters import check_twin
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.plan.memory import evaluation_bytes, training_bytes
from coconut.plan.plan import find_model, to_fetch
from coconut.reporting.console import Console

WARM_START = "warm_start"
_UPDATE = re.compile(r"update_(\d+)", re.ASCII)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a LaTRO run, in the order of their updates."""
    found = [p for p in run_dir.glob("update_*") if p.is_dir() and _UPDATE.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[7:]))


def resumed_from(config: LatroConfig) -> Path | None:
    """The checkpoint a run goes on from: its own newest one, or else checkpoint_path.

    Raises UserError if it is damaged, none of LaTRO's or with other thoughts, or weights alone.
    """
    own = checkpoints(config.run_dir)
    found = own[-1] if own else Path(config.checkpoint_path) if config.checkpoint_path else None
    if found is None:
        return None
    checkpoint.verify(found)
    made = checkpoint.read_json(found / checkpoint.COCONUT)
    begin = "begin with its weights (load_model_path instead of checkpoint_path)"
    if made.get("method") != "latro":
        raise UserError(
            str(found),
            f"was trained by {made.get('method')}, so LaTRO cannot go on from it; {begin}",
        )
    thoughts = made.get("c_thought", 0)
    if thoughts != config.latro_latents:
        raise UserError(
            str(found),
            f"was trained with latro_latents: {thoughts}, not {config.latro_latents}; choose"
            f" another run_name for a new run, or {begin}",
        )
    if not (found / checkpoint.OPTIMIZER).exists():
        raise UserError(
            str(found),
            f"holds weights alone, no optimizer to go on with; name an update_N, or {begin}",
        )
    return found


def warm_weights(config: LatroConfig) -> Path | None:
    """The weights a warm start ended with: this run's, or those of the run of checkpoint_path.

    They are the reference. Raises UserError if a run is gone on from that has them no more.
    """
    runs = [config.run_dir]
    if config.checkpoint_path:
        runs.append(Path(config.checkpoint_path).resolve().parent)
    found = next((run / WARM_START for run in runs if (run / WARM_START).is_dir()), None)
    goes_on = config.checkpoint_path or checkpoints(config.run_dir)
    if found is None and goes_on and config.warm_start_updates and config.kl_coef:
        raise UserError(
            str(runs[-1] / WARM_START),
            "gone, and with it the reference of the KL term; bring it back, or set kl_coef: 0",
        )
    return found


def whole_update(config: LatroConfig, n_processes: int) -> LatroConfig:
    """The run that one process would have to do for the result of several."""
    steps = config.gradient_accumulation_steps * n_processes
    return replace(config, gradient_accumulation_steps=steps)


def plan_lines(config: LatroConfig, n_items: int, n_processes: int = 1) -> list[str]:
    """Updates and both ways of counting epochs, in words. config: of all processes together."""
    total = config.n_updates(n_items)
    P, B = config.n_prompts, config.local_batch
    shared = f", dealt out to {n_processes} processes" if n_processes > 1 else ""
    return [
        f"{total:,} updates of {P:,} prompts x {config.rloo_k} rationales = {B:,} rollouts"
        f" ({config.batch_size_training} rows x {config.gradient_accumulation_steps}"
        f" micro-batches{shared})",
        f"epochs: {total * P / n_items:.2f} passes over {n_items:,} prompts;"
        f" counted in rollouts, as released, {total * B / n_items:.2f}",
    ]


def print_latro_plan(config: LatroConfig, twin: str, n_processes: int = 1) -> None:
    """Check everything that needs no weights and print the plan of a LaTRO run.

    n_processes: how many the run is spread over. Of a model of the hub only what describes it is
    fetched. Raises UserError.
    """
    last, config = resumed_from(config), whole_update(config, n_processes)
    warm_weights(config)
    model, console = find_model(config, last), Console()
    shape = model.shape
    if model.source is not None:
        check_twin(twin, config.adapter, model.source.config, model.name)
    size = f"{shape.n_params / 1e6:.1f}M params" if shape else "size unknown"
    lines = [f"{twin} | {model.name} | {size} | run {config.name} | latro, preset {config.preset}"]
    lines += filter(None, (model.note, to_fetch(config, last)))
    if model.tokenizer is None:
        lines += plan_lines(config, len(DataSet(config).numbered("train")), n_processes)
    else:
        data = Data(config, model.tokenizer)
        lines += plan_lines(config, len(data.train), n_processes)
        lines.append(
            f"evaluates {min(config.evaluation_items, len(data.validation)):,} of"
            f" {len(data.validation):,} items of {data.questions.path('validation')}"
            + (" held out of train" if data.questions.is_held_out else "")
        )
        if config.warm_start_updates and warm_weights(config) is None:
            lines.append(
                f"warm start: {config.warm_start_updates:,} updates of {config.warm_start_batch}"
                f" rows on {len(data.written_rows()):,} written rationales"
            )
        if config.latro_latents:
            lines.append(f"{config.latro_latents} thoughts before every rationale")
        if config.adapter:
            lines.append(f"trains {config.adapter.type} of rank {config.adapter.rank} alone")
        if config.test_at_end:
            lines.append(
                f"the best checkpoint answers {len(data.test):,} items of"
                f" {data.questions.path('test')}, once"
            )
        longest = max(len(data.prompt(i).ids) + len(i["response_ids"]) for i in data.train)
        L = config.response_length
        lines.append(
            f"longest row {longest + L} tokens: prompt and answer {longest}, rationale {L}"
        )
        if shape is not None:
            check_room(data, data.splits, shape.n_positions)
            rows = config.batch_size_training
            options = (config.bf16, config.gradient_checkpointing)
            step = training_bytes(shape, rows, longest + L, rows * (L + longest), *options)
            step += 4 * shape.n_params * (config.kl_coef > 0)
            draw = evaluation_bytes(shape, config.rollout_batch_size, longest, L, config.bf16)
            lines.append(
                f"estimated peak memory: update {step / 1e9:.2f} GB, sampling {draw / 1e9:.2f} GB"
            )
    for line in lines:
        console.say(line)
    console.say("checked: no model was built, no weights were downloaded, nothing was written")
