"""`method: sft` over a data set: the curriculum's loop, asked and judged as LaTRO is.

The baseline LaTRO is held against: cross-entropy on the answers that people wrote, one prompt for
training and evaluation, the best checkpoint by accuracy on items held out of train.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coconut import files
from coconut.batches.curriculum import Sample
from coconut.batches.questions import Questions
from coconut.checkpoints import checkpoint
from coconut.reporting.console import Console
from coconut.run import ending
from coconut.run.answering import answer, check_room
from coconut.run.curriculum_loop import Runner
from coconut.run.evaluate import Evaluation


@dataclass(frozen=True)
class Written:
    """Samples that are the same in every epoch."""

    where: str
    kept: list[Sample]

    def samples(self, epoch: int) -> list[Sample]:
        """The samples of an epoch, tokenised."""
        return self.kept


class SftRunner(Runner):
    """One SFT run: `train()`."""

    def train(self) -> None:
        """Train the epochs that are left; then, if asked, the best checkpoint answers the test."""
        super().train()
        if self.config.test_at_end:
            self._test()

    def _read_data(self) -> None:
        self.questions = Questions(self.config, self.tokenizer)
        self.val_path = self.questions.path("validation")
        self.val_items = self.questions.items("validation")
        self.val, self.swapped = self.questions.samples(self.val_items), None
        train = self.questions.samples(self.questions.items("train"))
        for path in sorted({self.val_path, self.questions.path("train")}):
            self.world.check_same_file(Path(path))
        self.data = Written(self.questions.path("train"), train)

    def _check_lengths(self, n_positions: int | None) -> None:
        super()._check_lengths(n_positions)
        if self.config.test_at_end:
            # Now, not after hours of training.
            path, self.test = self.questions.path("test"), self.questions.items("test")
            check_room(self.questions, self.test, path, n_positions)
            self.world.check_same_file(Path(path))

    def _evaluate(self, stage: int, title: str) -> Evaluation:
        with self.console.progress(title, len(self.val_items)) as bar:
            asked = (self.backend, self.config, self.questions, self.val_items)
            predictions, summary, _ = answer(*asked, bar.advance, self.world)
        return Evaluation(predictions, summary)

    def _test(self) -> None:
        """The checkpoint with the best accuracy on the test split, once for the run."""
        path = self.run_dir / "test.json"
        accuracies = {int(epoch): e["accuracy"] for epoch, e in self.evaluations.items()}
        best = min(accuracies, key=lambda epoch: (-accuracies[epoch], epoch))
        directory = self.run_dir / checkpoint.checkpoint_name(best)
        # As the first process sees it; a debug run saves no checkpoint.
        (is_done, has_best), *_ = self.world.exchange([path.exists(), directory.is_dir()])
        if is_done:
            return
        if has_best:
            self.backend.restore(directory)
        with Console(self.run_dir, rank=self.world.rank) as console:
            data = self.questions.path("test")
            with console.progress("test", len(self.test)) as bar:
                _, summary, _ = answer(
                    self.backend, self.config, self.questions, self.test, bar.advance, self.world
                )
            summary |= {
                "checkpoint": str(directory) if has_best else "last",
                **ending.measured_with(self.twin, self.backend, data),
            }
            if self.world.is_first:
                files.write_json(path, summary)
            n = summary["n"]
            console.event("test", path=str(path), answer=(round(summary["accuracy"] * n), n))
