"""`method: sft` over a data set: the curriculum's loop, asked and judged as LaTRO is.

The baseline LaTRO is held against: cross-entropy on the answers that people wrote, one prompt for
training and evaluation, the best checkpoint by accuracy on items held out of train.
"""

from pathlib import Path
from typing import Any

from coconut.batches.questions import Questions
from coconut.batches.training_data import WrittenSamples
from coconut.checkpoints import checkpoint
from coconut.run.answering import answer, check_room
from coconut.run.curriculum_loop import Runner
from coconut.run.ending import test_once
from coconut.run.evaluate import Evaluation


class SftRunner(Runner):
    """One SFT run: `train()`, then, if asked, the best checkpoint answers the test split."""

    def _finish(self) -> None:
        """If asked, the checkpoint with the best accuracy answers the test split."""
        if not self.config.test_at_end:
            return
        accuracies = {int(epoch): e["accuracy"] for epoch, e in self.evaluations.items()}
        best = min(accuracies, key=lambda epoch: (-accuracies[epoch], epoch))
        directory = self.run_dir / checkpoint.checkpoint_name(best)
        test_once(self.run, directory, self.questions.path("test"), self._answer_test)

    def _answer_test(self) -> tuple[dict[str, Any], float]:
        with self.console.progress("test", len(self.test)) as bar:
            _, summary, _ = answer(self.run, self.questions, self.test, bar.advance)
        return summary, summary["accuracy"]

    def _read_data(self) -> None:
        self.questions = Questions(self.config, self.tokenizer)
        self.val_path = self.questions.path("validation")
        self.val_items = self.questions.items("validation")
        self.val, self.swapped = self.questions.samples(self.val_items), None
        train = self.questions.samples(self.questions.items("train"))
        for path in sorted({self.val_path, self.questions.path("train")}):
            self.world.check_same_file(Path(path))
        self.data = WrittenSamples(self.questions.path("train"), train)

    def _check_lengths(self, n_positions: int | None) -> None:
        super()._check_lengths(n_positions)
        if self.config.test_at_end:
            # Now, not after hours of training.
            path, self.test = self.questions.path("test"), self.questions.items("test")
            check_room(self.questions, self.test, path, n_positions)
            self.world.check_same_file(Path(path))

    def _evaluate(self, stage: int, title: str) -> Evaluation:
        with self.console.progress(title, len(self.val_items)) as bar:
            found = answer(self.run, self.questions, self.val_items, bar.advance)
        predictions, summary, _ = found
        return Evaluation(predictions, summary)
