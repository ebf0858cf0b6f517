"""The beginning of every run: open it, let its processes agree, say and log what it is."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from coconut.backend import Backend, MakeBackend
from coconut.checkpoints import checkpoint
from coconut.checkpoints.source import open_source
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.files import write_text
from coconut.reporting.console import Console
from coconut.reporting.report import Reporter
from coconut.run.changed import SETTINGS, changed_keys, changed_lines, settings_of
from coconut.world import World

_SUFFIXES = (".json", ".jsonl", ".yaml", ".html", ".png")
_FOLDERS = re.compile(r"(epoch|update)_\d+|last|best|warm_start", re.ASCII)
"""What a run directory has names of: files, and checkpoints."""


class Run:
    """A run that is open: `agree`, `build`, `begin`, `greet`, in this order, then its loop.

    config: as given. world: the processes it is spread over, each with a Run of its own that does
    the same; the first one writes all files and speaks. begins_with: the checkpoint to open in
    place of the one that the configuration names. goes_on_from: the checkpoint to go on from, if it
    is another one. Raises UserError as opening a checkpoint does, and for keys that have changed.
    """

    backend: Backend
    console: Console
    reporter: Reporter | None = None

    def __init__(
        self,
        config: RunConfig,
        twin: str,
        world: World | None = None,
        begins_with: Path | None = None,
        goes_on_from: Path | None = None,
    ):
        self.config, self.twin, self.world = config, twin, world or World()
        self.directory = config.run_dir
        before = goes_on_from or begins_with
        self.changed = changed_keys(config, before) if self.world.is_first else {}
        if begins_with and not (begins_with / checkpoint.CHECKSUMS).exists():
            checkpoint.verify(begins_with)  # it says so; where there are some, they are checked
        opened = open_source(config, begins_with)
        self.source, self.tokenizer, self.made_with = (
            opened.source,
            opened.tokenizer,
            opened.coconut,
        )

    def agree(self, files: Iterable[str]) -> None:
        """Raise UserError unless all processes read the same files, wherever they run.

        files: data that is there before the run.
        """
        world, directory = self.world, self.source.directory
        world.check_same("configuration", self.config.to_yaml())
        for path in sorted(files):
            world.check_same_file(Path(path))
        if directory is None:
            world.check_same("model_config_path", json.dumps(self.source.config))
        elif (directory / checkpoint.CHECKSUMS).exists():
            # Its digests were compared with the files when it was opened.
            world.check_same_file(directory / checkpoint.CHECKSUMS)
        else:
            for name in sorted(checkpoint.weight_files(directory)):
                world.check_same_file(directory / name)

    def build(self, make_backend: MakeBackend) -> Backend:
        """The model on its device."""
        self.backend = make_backend(self.config, self.source)
        return self.backend

    def begin(self, draws: bool = False) -> Console:
        """Open the log and write config.yaml. draws: curves are drawn beside it.

        Last of all that can be refused: a run that cannot be done leaves its directory as it was.
        """
        if self.world.is_first:
            check_in_the_way(self.directory)
        self.world.wait()
        config = self.config
        # An evaluation leaves the settings of the training whose directory it shares.
        is_beside = config.only_eval and settings_of(self.directory).get("only_eval") is False
        self.console = Console(self.directory, rank=self.world.rank, tracked=config)
        if not is_beside:
            self.write(SETTINGS, config.to_yaml())
        if draws and config.report and self.world.is_first:
            self.reporter = Reporter(self.directory, self.console.say)
        return self.console

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, the log is open; at the end, however it comes, the curves are drawn once more."""
        with self.console:
            try:
                yield
            finally:
                if self.reporter:
                    self.reporter.finish()

    def greet(self, about: str, *lines: str, continuing: str | None = None) -> None:
        """Say what runs and on what, and log it with the resolved configuration.

        about: what is particular to the method. lines: said after it. continuing: where a run that
        was stopped goes on.
        """
        config, b, adapter = self.config, self.backend, self.source.adapter
        trained = f", {b.n_trained / 1e6:.2f}M trained ({adapter.lora.type})" if adapter else ""
        self.console.record(
            "start",
            twin=self.twin,
            device=b.device,
            continuing=continuing,
            changed=self.changed,
            config=asdict(config),
        )
        self.console.say(
            f"{self.twin} | {b.model_type} {b.n_params / 1e6:.1f}M params{trained} | {b.device}"
            f" {b.dtype} | run {config.name} | method {config.method}{about} | seed {config.seed}"
        )
        goes_on = continuing and f"continuing {continuing}"
        changed = changed_lines(self.changed)
        for line in filter(None, [b.note, *config.notes, *lines, goes_on, *changed]):
            self.console.say(line)

    def write(self, name: str, text: str) -> None:
        """A file of the run directory; written by the first process only."""
        if self.world.is_first:
            write_text(self.directory / name, text)


def check_in_the_way(directory: Path) -> None:
    """Raise UserError where a folder has the name of a file that a run writes, or the reverse."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_dir() and path.suffix in _SUFFIXES:
            raise UserError(str(path), "a folder where the run writes a file: move it away")
        if path.is_file() and _FOLDERS.fullmatch(path.name):
            raise UserError(str(path), "a file where the run writes a checkpoint: move it away")


def agreed_paths(world: World, *paths: Path | None) -> list[Path | None]:
    """The paths as the first process sees them."""
    first, *_ = world.exchange([None if path is None else str(path) for path in paths])
    return [None if path is None else Path(path) for path in first]


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
