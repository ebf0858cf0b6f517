"""Trackers by name: where a run's numbers go beside its log. Each is imported when asked for."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.reporting.log import LOG


class TensorBoard:
    """TensorBoard's event files with the two methods of a run of wandb or trackio.

    Each event of the run is a step, as with wandb; those before a run went on count.
    """

    def __init__(self, module: Any, config: RunConfig) -> None:
        log = config.run_dir / LOG
        self._step = log.read_bytes().count(b"\n") if log.is_file() else 0
        self._writer = module.SummaryWriter(str(config.run_dir / "tensorboard"))

    def log(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, self._step)
        self._step += 1

    def finish(self) -> None:
        self._writer.close()


def _start(module: Any, config: RunConfig) -> Any:
    return module.init(project=config.project, name=config.name, config=asdict(config))


TRACKERS: dict[str, tuple[str, Callable[[Any, RunConfig], Any]]] = {
    "wandb": ("wandb", _start),
    "trackio": ("trackio", _start),
    # Not torch's SummaryWriter, which is the same code: a Mac with mlx has no torch.
    "tensorboard": ("tensorboardX", TensorBoard),
}
"""Value of `report_to` -> the package to install, and how it starts to follow a run."""


def open_tracker(config: RunConfig) -> Any:
    """The tracker that a run names: `log(numbers)`, `finish()`; None for none, or in debugging.

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
