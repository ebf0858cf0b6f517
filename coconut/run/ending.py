"""How a run ends: with results, with its test split answered once, or because a number ran away."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coconut.backend import Backend
from coconut.errors import UserError
from coconut.files import sha256, write_json
from coconut.reporting.log import plain
from coconut.run.start import Run
from coconut.world import World


def measured_with(run: Run, data: str) -> dict[str, Any]:
    """What a summary says of its method, its machine, and the file of its questions."""
    return {
        "method": run.config.method,
        "backend": run.twin,
        "device": run.backend.device,
        "dtype": run.backend.dtype,
        "data": data,
        "data_sha256": sha256(Path(data)),
    }


def memory_used(world: World, backend: Backend) -> dict[str, int]:
    """What `Backend.memory` counts, the most of any process."""
    found = world.exchange(backend.memory())
    return {name: max(of_one[name] for of_one in found) for name in found[0]}


def write_results(
    run: Run, summary: dict[str, Any], name: str | None = None, rows: Sequence[dict[str, Any]] = ()
) -> None:
    """Write summary.json, and beside it a file of this name with a line a row.

    Of a diverged model some numbers are not finite; JSON has null for them.
    """
    if name is not None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        run.write(name, "".join(lines))
    if run.world.is_first:
        write_json(run.directory / "summary.json", plain("summary", summary, {}))


def say_cut(run: Run, n: int) -> None:
    """Say how many answers the model had no further position for, if any were cut so."""
    if n:
        run.console.say(
            f"note: answers cut where the model's {run.source.n_positions} positions end: {n}"
            " (out_of_positions in predictions.jsonl)"
        )


def check_finite(run: Run, remedy: str, where: dict[str, Any], **values: float) -> None:
    """Raise UserError, and log the event, for a loss, reward or gradient that is not finite.

    remedy: what to do about it. where: the fields of the event, which tell the update.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            run.console.event("non_finite", **where)
            place = ", ".join(f"{key.replace('_', ' ')} {at}" for key, at in where.items())
            raise UserError(
                str(run.directory),
                f"{name.replace('_', ' ')} {value} at {place}: not finite; {remedy}; checkpoints of"
                " before are untouched",
            )


def test_once(
    run: Run, best: Path, data: str, answers: Callable[[], tuple[dict[str, Any], float]]
) -> None:
    """The best checkpoint on the test split, once for the run, in test.json.

    best: the checkpoint, if it was saved; else the weights of now answer. answers: what the file
    says, and the accuracy.
    """
    path = run.directory / "test.json"
    # As the first process sees it.
    (is_done, has_best), *_ = run.world.exchange([path.exists(), best.is_dir()])
    if is_done:
        run.console.say(f"{path} is there already: the test split is answered once for a run")
        return
    if has_best:
        run.backend.restore(best)
    found, accuracy = answers()
    found |= {"checkpoint": str(best) if has_best else "last", **measured_with(run, data)}
    if run.world.is_first:
        write_json(path, found)
    n = found["n"]
    run.console.event("test", path=str(path), answer=(round(accuracy * n), n))
