"""Trackers by name: where a run's numbers go beside its log. Each is imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.reporting.log import LOG


class Tracker(Protocol):
    """What a run needs of a tracker; a run of wandb's or trackio's is one as it stands."""

    def log(self, numbers: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files of TensorBoard as a tracker.

    writer: a SummaryWriter. n_before: events of the run so far; each is a step, as with wandb.
    """

    def __init__(self, writer: Any, n_before: int) -> None:
        self._writer, self._step = writer, n_before

    def log(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, self._step)
        self._step += 1

    def finish(self) -> None:
        self._writer.close()


def _start(module: Any, config: RunConfig) -> Tracker:
    return module.init(project=config.project, name=config.name, config=asdict(config))


def _tensorboard(module: Any, config: RunConfig) -> Tracker:
    log = config.run_dir / LOG
    n_before = log.read_bytes().count(b"\n") if log.is_file() else 0
    return TensorBoard(module.SummaryWriter(str(config.run_dir / "tensorboard")), n_before)


TRACKERS: dict[str, tuple[str, Callable[[Any, RunConfig], Tracker]]] = {
    "wandb": ("wandb", _start),
    "trackio": ("trackio", _start),
    # Not torch's SummaryWriter, which is the same code: a Mac with mlx has no torch.
    "tensorboard": ("tensorboardX", _tensorboard),
}
"""Value of `report_to` -> the package to install, and how it starts to follow a run."""


def open_tracker(config: RunConfig) -> Tracker | None:
    """The tracker that a run names; none if it names none, or is for debugging.

    Raises UserError if it is not installed.
    """
    if config.report_to == "none" or config.debug:
        return None
    package, start = TRACKERS[config.report_to]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            config.report_to,
            f"asked for but not installed: pip install {package}, or set report_to to none",
        ) from error
    return start(module, config)


def numbers_of(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker plots: the numbers of an event, a share as its share."""
    found = {}
    for name, value in record.items():
        value = value.get("share") if isinstance(value, dict) else value
        if isinstance(value, int | float) and name != "time":
            found[f"{kind}/{name}"] = value
    return found
