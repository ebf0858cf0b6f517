"""Where a LaTRO run goes on from: its checkpoints and its warm start."""

import re
from dataclasses import replace
from pathlib import Path

from coconut import files
from coconut.checkpoints import checkpoint
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.run.saving import STATE

WARM_START = "warm_start"
REFERENCE = "reference_{:04d}"
"""Weights after so many updates, which became the reference (reference_every)."""
_UPDATE = re.compile(r"update_(\d+)", re.ASCII)


def references(run_dir: Path) -> list[Path]:
    """The weights that became the reference of a run, in the order of their updates."""
    return sorted(run_dir.glob("reference_*"), key=lambda p: int(p.name[10:]))


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
    made = files.read_json(found / checkpoint.COCONUT)
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


def reference_weights(config: LatroConfig, resumed: Path | None) -> Path | None:
    """The weights that are the reference of a run that goes on from `resumed`: the last that became
    it on the way there, or those of the warm start. Raises UserError if they are gone.
    """
    every = config.reference_every
    done = files.read_json(resumed / STATE)["n_updates"] if resumed and every else 0
    if resumed is None or not every or done < every:
        return warm_weights(config)
    found = resumed.parent / REFERENCE.format(done // every * every)
    if not found.is_dir():
        raise UserError(
            str(found),
            "gone, and with it the reference of the KL term; bring it back, or go on with the"
            " reference_every that it was trained with",
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
        _work(config, total, n_items),
    ]


def _work(config: LatroConfig, total: int, n_items: int) -> str:
    """Rollouts and tokens of the whole run, and what the released code would make of its epochs."""
    rollouts, L = total * config.local_batch, config.response_length
    again = f", {config.num_iterations} times" if config.num_iterations > 1 else ""
    line = (
        f"in all {rollouts:,} rollouts, up to {rollouts * L:,} tokens drawn, then scored, then"
        f" trained on{again}"
    )
    if (config.total_updates, config.total_episodes, config.epoch_counts) == (
        None,
        None,
        "prompts",
    ):
        released = replace(config, epoch_counts="rollouts").n_updates(n_items) * config.local_batch
        line += (
            f"; {rollouts / released:.0f} times the {released:,} that the released code makes of"
            " such epochs (epoch_counts: rollouts)"
        )
    return line
