"""The training samples of each epoch: from a file, or generated, kept or fresh every epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coconut.batches.batch import Batch, chunks, collate
from coconut.batches.curriculum import Row, Sample
from coconut.batches.dataset import raise_all, read_items, tokenize
from coconut.config.keys import RunConfig
from coconut.files import shipped
from coconut.tasks.generated import of_epoch, read_keys, write
from coconut.tasks.makers import TASKS, maker
from coconut.text.tokenizer import Tokenizer
from coconut.world import World

DEBUG_ITEMS, DEBUG_VALIDATION = 5_000, 32
N_FITTED = 512
"""Training items that a feedback rule's `linear` is fitted on, if it asks for that."""
GENERATED = "generated training data"


@dataclass(frozen=True)
class WrittenSamples:
    """Samples that are the same in every epoch, and the file they are from."""

    where: str
    kept: list[Sample]

    def samples(self, epoch: int) -> list[Sample]:
        """The samples of an epoch, tokenised."""
        return self.kept


class TrainingData:
    """Samples by epoch. With generate.fresh every epoch brings items never seen before.

    tokenizer: may be None where only `preview` is called. world: the processes that read the data;
    the first makes what is missing.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer | None,
        world: World | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.world = world or World()
        limits = [DEBUG_ITEMS] * config.debug + [config.max_size] * bool(config.max_size)
        self.limit = min(filter(None, limits), default=None)
        self.generated = dict(config.generate)
        self.fresh = self.generated.pop("fresh", False)
        self.n_items = int(self.generated.pop("items", 0))
        self.seed = int(self.generated.pop("seed", config.seed))
        self.maker = maker(self.generated.pop("task", next(iter(TASKS))))
        self.cached: tuple[int, list[Sample]] | None = None

    @property
    def where(self) -> str:
        """The file the samples are from, for messages."""
        made = self.fresh or self.config.train_path is None
        return GENERATED if made else str(self.config.train_path)

    def samples(self, epoch: int) -> list[Sample]:
        """The samples of an epoch, tokenised."""
        key = epoch if self.fresh else 0  # what is not fresh never changes
        if self.cached is None or self.cached[0] != key:
            self.cached = (key, self._read(epoch)[: self.limit])
        return self.cached[1]

    def preview(self, n: int) -> tuple[list[dict[str, Any]], str, int]:
        """(items, where they are from, how many there will be), nothing written.

        Of items still to be made the first n are made.
        """
        path = self.config.train_path
        if path is not None and not self.fresh and Path(path).exists():
            items = read_items(path)
            total = len(items)
        else:
            total = self.n_items
            path = GENERATED if path is None or self.fresh else f"{path} (made on first use)"
            items = list(self._generate(min(n, total), self.config.resume))
        return self._prepared(items, path), path, min(total, self.limit or total)

    def _read(self, epoch: int) -> list[Sample]:
        assert self.tokenizer is not None, "given wherever samples are asked for"
        path = self.config.train_path
        if self.fresh or path is None:
            items, path = list(self._generate(self.n_items, epoch)), GENERATED
        else:
            if self.world.is_first and not Path(path).exists():
                self._write(Path(path))
            self.world.wait()
            if not Path(path).exists():  # another machine, which shares no disk with the first
                self._write(Path(path))
            self.world.check_same_file(Path(path))
            items = read_items(path)
        return tokenize(self._prepared(items, path), self.tokenizer, path)

    def _prepared(self, items: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        if self.config.method == "recall":
            items = [item | {"steps": sentences(item["question"])} for item in items]
            empty = (i for i, item in enumerate(items) if not item["steps"])
            raise_all(where, [f"item {i}: no sentence to recall" for i in empty])
        return items

    def _generate(self, n_items: int, epoch: int) -> Any:
        start = epoch * self.n_items if self.fresh else 0
        exclude = {key for path in self._held_out() for key in read_keys(path, self.maker.keys)}
        return self.maker.generate(self._options(epoch), self.seed, n_items, start, exclude)

    def _write(self, path: Path) -> None:
        what = (self._options(0), self.seed, self.n_items, self._held_out())
        write(path, self.maker.generate, self.maker.keys, *what)

    def _options(self, epoch: int) -> Any:
        return of_epoch(self.maker.Options, self.generated, epoch)

    def _held_out(self) -> list[Path]:
        """Files that no training item may come from: those that ship, and val_path."""
        paths = [shipped(f"data/prosqa_made_{split}.json") for split in ("valid", "test")]
        return [*paths, Path(str(self.config.val_path))]


def sentences(question: str) -> list[str]:
    """The statements of a ProsQA question, without the question sentence."""
    *statements, _ = question.split(". ")
    return [statement + "." for statement in statements]


def plain_text(samples: Sequence[Sample], n_rows: int, pad_id: int) -> Iterator[Batch]:
    """The first N_FITTED items as ordinary text without latents, n_rows a batch."""
    for chunk in chunks(np.arange(min(len(samples), N_FITTED)), n_rows):
        rows = []
        for sample in (samples[i] for i in chunk):
            ids = [*sample.question, *(t for s in sample.steps for t in s), *sample.answer]
            rows.append(Row(sample.idx, ids, None, -1, 0))
        yield collate(rows, pad_id)
