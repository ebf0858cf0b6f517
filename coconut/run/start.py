"""The beginning of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from coconut.checkpoints import checkpoint
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.world import World


def check_same(world: World, config: RunConfig, source: Source, files: Iterable[str]) -> None:
    """Raise UserError unless all processes read the same files, wherever they run.

    files: data that is there before the run.
    """
    world.check_same("configuration", config.to_yaml())
    for path in sorted(files):
        world.check_same_file(Path(path))
    if source.directory is None:
        world.check_same("model_config_path", json.dumps(source.config))
    elif (source.directory / checkpoint.CHECKSUMS).exists():
        # Its digests were compared with the files when it was opened.
        world.check_same_file(source.directory / checkpoint.CHECKSUMS)
    else:
        for name in sorted(checkpoint.weight_files(source.directory)):
            world.check_same_file(source.directory / name)


def processes_in_words(config: RunConfig, n: int) -> str:
    """What a run of n processes does with its batches, or would do with several."""
    b, g = config.batch_size_training, config.gradient_accumulation_steps
    if n == 1:
        return (
            f"one process: an update is {g} micro-batches of {b} rows ({g * b}); N processes share"
            f" N * {g} of them (docs/distributed.md), and the questions"
        )
    return (
        f"{n} processes: an update is {n} * {g} micro-batches of {b} rows ({n * g * b}); one"
        f" process computes the same with gradient_accumulation_steps: {n * g}"
    )
