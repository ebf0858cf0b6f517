"""Checkpoints of a run: written by all its processes together, and what one may be gone on from."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coconut.batches.curriculum import markers_of
from coconut.checkpoints import checkpoint
from coconut.checkpoints.checkpoint import latest
from coconut.errors import UserError
from coconut.files import read_json, write_json
from coconut.run.start import Run

STATE = "trainer_state.json"
LAST = "last"
"""Directory of a run's checkpoint inside an epoch (save_every); the others are epoch_NN."""


def save(
    run: Run,
    directory: Path,
    made: dict[str, Any],
    state: dict[str, Any],
    with_optimizer: bool = True,
) -> None:
    """Write a checkpoint, whole or not at all; a debug run writes none.

    made: the facts of the method that coconut.json holds. state: where the run stands. A checkpoint
    with its optimizer is one to go on from, so it is an event.
    """
    if run.config.debug:
        return
    start = time.perf_counter()
    if run.world.is_first:
        with checkpoint.write_atomically(directory) as partial:
            run.world.wait()  # the others hear of a disk that refuses, and give nothing
            run.backend.save(partial, with_optimizer=with_optimizer)
            run.tokenizer.save(partial)
            _describe(run, partial, made, state)
    else:
        run.world.wait()
        run.backend.save(None, with_optimizer=with_optimizer)
    run.world.wait()
    if with_optimizer and run.world.is_first:
        size = sum(f.stat().st_size for f in directory.iterdir())
        seconds = time.perf_counter() - start
        run.console.event("saved", path=str(directory), bytes=size, seconds=seconds)


def _describe(run: Run, directory: Path, made: dict[str, Any], state: dict[str, Any]) -> None:
    markers, feedback = markers_of(run.tokenizer), run.source.feedback
    facts = {
        "format_version": checkpoint.FORMAT_VERSION,
        "method": run.config.method,
        "feedback": feedback and str(feedback.rule),
        "latent_ids": [markers.start, markers.end, markers.latent] if markers else None,
    }
    write_json(directory / checkpoint.COCONUT, facts | made)
    write_json(directory / STATE, {"seed": run.config.seed, "backend": run.twin} | state)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of a run that got furthest, None if there is none."""
    found = [path for path in (latest(run_dir), run_dir / LAST) if path and path.is_dir()]
    return max(found, key=progress_of, default=None)


def progress_of(directory: Path) -> tuple[int, int]:
    """(epochs done, updates done in the next one) of a run's checkpoint. Raises UserError."""
    path = directory / STATE
    state = read_json(path)
    epoch, update = state.get("epoch"), state.get("update_in_epoch")
    if type(epoch) is not int or type(update) is not int:
        raise UserError(str(path), "expected epoch and update_in_epoch; the file is damaged")
    return epoch, update


def read_state(run: Run, directory: Path, rows_per_update: int, is_whole: str) -> dict[str, Any]:
    """Where a checkpoint's run stands, if this one may go on from it.

    rows_per_update: of this run. is_whole: the state's field that is 0 where updates of another
    size may follow. Raises UserError for another seed, or updates of other rows.
    """
    state = read_json(directory / STATE)
    if state["seed"] != run.config.seed:
        raise UserError(
            str(directory),
            f"was trained with seed {state['seed']}, not {run.config.seed}; choose another name"
            " for a new run",
        )
    rows = state.get("rows_per_update", rows_per_update)
    if state[is_whole] and rows != rows_per_update:
        raise UserError(
            str(directory),
            f"stands after updates of {rows} rows, now an update has {rows_per_update};"
            f" batch_size_training * gradient_accumulation_steps * processes must be {rows} to go"
            " on with it",
        )
    return state


def prune(
    run: Run, found: Callable[[Path], Sequence[Path]], keep: int, spare: Sequence[Path] = ()
) -> None:
    """Delete all but the last `keep` checkpoints and the spared ones; keep 0 deletes none.

    found: gives those of a run directory, oldest first. A debug run, which saves none, keeps all.
    """
    if keep and run.world.is_first and not run.config.debug:
        checkpoint.prune(found(run.directory), keep, spare)


def delete_last(directory: Path) -> None:
    """Delete the checkpoint inside an epoch of a run directory, when the epoch is saved."""
    last = directory / LAST
    if last.is_dir():
        # By a rename first: killed halfway, it must not be taken for a checkpoint.
        last.rename(doomed := last.with_name(f".{LAST}.deleted-{os.getpid()}"))
        shutil.rmtree(doomed)
