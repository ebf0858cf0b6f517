"""Checkpoints of a run: written by all its processes together, and what one may be gone on from."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coconut.batches.curriculum import markers_of
from coconut.checkpoints import checkpoint
from coconut.checkpoints.checkpoint import latest
from coconut.errors import UserError
from coconut.files import read_json, write_json
from coconut.reporting.curves import Curve, read_history
from coconut.reporting.log import LOG
from coconut.run.start import Run

STATE = "trainer_state.json"
EVALUATIONS = "evaluations.json"
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


def newest_checkpoint(run_dir: Path, recovers: bool = False) -> Path | None:
    """The checkpoint of a run that got furthest, None if there is none.

    recovers: by the run itself, which puts back what it was killed while replacing.
    """
    if recovers:
        checkpoint.recover(run_dir)
    found = [path for path in (latest(run_dir), run_dir / LAST) if path and path.is_dir()]
    return max(found, key=progress_of, default=None)


def progress_of(directory: Path) -> tuple[int, int]:
    """(epochs done, updates done in the next one) of a run's checkpoint. Raises UserError."""
    state = state_of(directory, "epoch", "update_in_epoch")
    return state["epoch"], state["update_in_epoch"]


def state_of(directory: Path, *counts: str) -> dict[str, Any]:
    """What a checkpoint's trainer_state.json says, these whole numbers among it."""
    state = read_json(directory / STATE, checkpoint.REMEDY)
    if not all(type(state.get(name)) is int and state[name] >= 0 for name in counts):
        problem = f"expected {' and '.join(counts)}; the file is damaged; {checkpoint.REMEDY}"
        raise UserError(str(directory / STATE), problem)
    return state


def read_state(run: Run, directory: Path, rows_per_update: int, is_whole: str) -> dict[str, Any]:
    """Where a checkpoint's run stands, if this one may go on from it.

    rows_per_update: of this run. is_whole: the state's field that is 0 where updates of another
    size may follow. Raises UserError for another seed, or updates of other rows.
    """
    state = state_of(directory, "seed", "epoch", "update_in_epoch", "n_updates")
    if state["seed"] != run.config.seed and not run.config.resume_changed:
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


def read_evaluations(run_dir: Path) -> dict[str, Any]:
    """Accuracy and loss of each evaluated epoch; of a damaged file, as log.jsonl has them."""
    path = run_dir / EVALUATIONS
    if not path.exists():
        return {}
    with suppress(UserError):
        found = read_json(path)
        if all(epoch.isdecimal() and _is_evaluation(e) for epoch, e in found.items()):
            return found
    if not (run_dir / LOG).is_file():
        raise UserError(str(path), f"damaged, and no {LOG} to make it anew from: put back either")
    curves = read_history(run_dir).curves
    answer, loss = (curves.get(f"eval/{name}", Curve()) for name in ("answer", "loss"))
    losses = dict(zip(loss.x, loss.y, strict=True))
    measured = zip(answer.x, answer.y, strict=True)
    return {str(int(x)): {"accuracy": y, "loss": losses[x]} for x, y in measured if x in losses}


def _is_evaluation(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(value.get(name)) in (int, float) for name in ("accuracy", "loss")
    )


def prune(
    run: Run, found: Callable[[Path], Sequence[Path]], keep: int, spare: Sequence[Path] = ()
) -> None:
    """Delete all but the last `keep` checkpoints and the spared ones; keep 0 deletes none.

    The one inside an epoch is done with, too. found: gives those of a run directory, oldest first.
    A debug run, which saves none, keeps all.
    """
    if not run.world.is_first or run.config.debug:
        return
    if (run.directory / LAST).is_dir():
        checkpoint.delete(run.directory / LAST)
    if keep:
        checkpoint.prune(found(run.directory), keep, spare)
