"""The loop: stages, training, evaluation, saving, resuming. A back end does the computing."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from coconut.backend import MakeBackend
from coconut.batches.batch import Batch, collate, epoch_order, grouped
from coconut.batches.curriculum import (
    Sample,
    draw_stage,
    evaluation_stage,
    item_rng,
    longest_row,
    markers_of,
    mixed_stage,
    n_stages,
    question_row,
    stage_of_epoch,
    training_row,
)
from coconut.batches.dataset import check_lengths, read_items, tokenize
from coconut.batches.training_data import (
    DEBUG_VALIDATION,
    TrainingData,
    WrittenSamples,
    plain_text,
)
from coconut.checkpoints import checkpoint
from coconut.config.keys import RunConfig
from coconut.reporting.console import N_SHOWN
from coconut.run import saving
from coconut.run.ending import check_finite
from coconut.run.evaluate import Evaluation, evaluate, report, validation_loss
from coconut.run.learning_rate import learning_rate
from coconut.run.saving import LAST, newest_checkpoint, prune, read_state, save
from coconut.run.start import Run, agreed_paths, processes_in_words
from coconut.tasks import prosqa
from coconut.world import World

REMEDY = "lower lr, set max_grad_norm: 1, or look at these items"


class Runner:
    """One run: `train()` or `evaluate_once()`.

    world: the processes it is spread over; see `coconut.run.start.Run`.
    """

    def __init__(
        self,
        config: RunConfig,
        make_backend: MakeBackend,
        twin: str,
        world: World | None = None,
    ):
        self.config, self.world, self.run_dir = config, world or World(), config.run_dir
        self.resumed = None
        if not config.only_eval:
            found = newest_checkpoint(self.run_dir, True) if self.world.is_first else None
            (self.resumed,) = agreed_paths(self.world, found)
        self.run = run = Run(config, twin, self.world, self.resumed)
        self.tokenizer, self.made_with = run.tokenizer, run.made_with
        # Once taught what to name, thoughts do so after further training without labels, too.
        self.labels_thoughts = bool((self.made_with or {}).get("labelled_thoughts"))
        self.markers = markers_of(self.tokenizer)
        run.agree([] if config.val_path is None else [config.val_path])
        self._read_data()
        self._check_lengths(run.source.n_positions)
        self.feedback = run.source.feedback
        self.backend = run.build(make_backend)
        self.epoch, self.update_in_epoch, self.n_updates = config.resume, 0, 0
        self.evaluations: dict[str, Any] = {}
        if self.resumed is not None:
            self._restore(self.resumed)
        self.console = run.begin(draws=not config.only_eval)

    def _read_data(self) -> None:
        """The validation items and the training data; val_path is where the items are from."""
        config = self.config
        self.val_path = str(config.val_path)
        self.val_items = read_items(self.val_path)
        if config.debug:
            self.val_items = self.val_items[:DEBUG_VALIDATION]
        self.val = tokenize(self.val_items, self.tokenizer, self.val_path)
        self.swapped = self._swap() if config.swap_test else None
        self.data: TrainingData | WrittenSamples = TrainingData(config, self.tokenizer, self.world)

    def _check_lengths(self, n_positions: int | None) -> None:
        """Raise UserError unless every row and question, at every stage to come, has a position."""
        config = self.config
        if config.only_eval:
            stages = [evaluation_stage(config, self.made_with)[0]]
        else:
            epochs = range(config.resume, config.num_epochs)
            stages = sorted({stage_of_epoch(config, epoch) for epoch in epochs})
            samples = self.data.samples(config.resume)
            lengths = {s.idx: longest_row(config, s, stages) for s in samples}
            check_lengths(lengths, n_positions, self.data.where)
        longest: dict[int, int] = {}
        for stage in stages:
            for sample in self.val:
                row = question_row(config, sample, stage, self.markers, config.n_latents)
                longest[sample.idx] = max(longest.get(sample.idx, 0), len(row.ids) + 1)
        check_lengths(longest, n_positions, self.val_path)

    # ---- training

    def train(self) -> None:
        """Train the epochs that are left, evaluating and saving on the way."""
        with self.run.opened():
            self._train()

    def _train(self) -> None:
        config = self.config
        self._greet()
        if self.resumed and self.update_in_epoch == 0:
            # The run may have been stopped between saving and what comes after it.
            if self._evaluation_due(self.epoch - 1):
                self._evaluate_epoch(self.epoch - 1)
            self._prune()
        if self.feedback and self.feedback.rule.is_fitted and not self.feedback.is_trained:
            samples = self.data.samples(self.epoch)
            texts = plain_text(samples, config.batch_size_training, self.tokenizer.pad_id)
            self.backend.fit_feedback(texts)
        while self.epoch < config.num_epochs:
            epoch, stage = self.epoch, stage_of_epoch(config, self.epoch)
            if self.update_in_epoch == 0 and self._resets(epoch, stage):
                self.backend.reset_optimizer()
            self._train_epoch(epoch, stage)
            self.epoch, self.update_in_epoch = epoch + 1, 0
            self._save(self.run_dir / checkpoint.checkpoint_name(self.epoch), stage)
            if self._evaluation_due(epoch):
                self._evaluate_epoch(epoch)
            self._prune()
        self._finish()

    def _finish(self) -> None:
        """What is left to do after the last epoch."""

    def _train_epoch(self, epoch: int, stage: int) -> None:
        config, backend = self.config, self.backend
        samples = self.data.samples(epoch)
        self.labels_thoughts = self.labels_thoughts or any(s.thoughts for s in samples)
        order = epoch_order(len(samples), config.seed, epoch)
        groups = grouped(order, config.batch_size_training, self._parts_per_update)
        total_updates = (config.num_epochs - config.resume) * len(groups)
        title = f"epoch {epoch + 1:02d}/{config.num_epochs} stage {stage}"
        with self.console.progress(title, len(groups)) as bar:
            bar.advance(self.update_in_epoch)
            began, first = time.perf_counter(), self.update_in_epoch
            for number in range(self.update_in_epoch, len(groups)):
                start = time.perf_counter()
                batches = [
                    self._batch(samples, chunk, epoch, stage, i, len(order))
                    for i, chunk in self.world.share(groups[number])
                ]
                if number == 0 and self.world.is_first:
                    self._log_first_row(batches[0], epoch)
                lr = learning_rate(config, self.n_updates, total_updates)
                progress = self.n_updates / total_updates
                stats = backend.train_step(batches, lr, (config.seed, epoch, number), progress)
                items = [samples[i].idx for _, chunk in groups[number] for i in chunk]
                where = {"epoch": epoch + 1, "step": number + 1, "items": items}
                check_finite(self.run, REMEDY, where, loss=stats.loss, gradient=stats.grad_norm)
                self.n_updates += 1
                self.update_in_epoch = number + 1
                seconds = time.perf_counter() - start
                per_update = (time.perf_counter() - began) / (number + 1 - first)
                last = number + 1 == len(groups)
                say = self.console.event if last or self._is_line(number) else self.console.record
                say(
                    "train",
                    epoch=epoch + 1,
                    n_epochs=config.num_epochs,
                    stage=stage,
                    step=number + 1,
                    n_steps=len(groups),
                    loss=stats.loss,
                    grad_norm=stats.grad_norm,
                    lr=lr,
                    tokens_per_second=stats.n_tokens / seconds,
                    eta_seconds=round(per_update * (total_updates - self.n_updates)),
                )
                if say == self.console.event and (compiled := backend.compiled_in_words()):
                    self.console.say(compiled)
                bar.advance(1, loss=stats.loss)
                if config.save_every and not last and (number + 1) % config.save_every == 0:
                    self._save(self.run_dir / LAST, stage)

    @property
    def _parts_per_update(self) -> int:
        return self.config.gradient_accumulation_steps * self.world.size

    @property
    def _rows_per_update(self) -> int:
        return self.config.batch_size_training * self._parts_per_update

    def _is_line(self, number: int) -> bool:
        """Whether an update gets a line on the terminal; every one is in log.jsonl."""
        return number == 0 or (number + 1) % self.config.log_every == 0

    def _batch(
        self,
        samples: list[Sample],
        chunk: np.ndarray,
        epoch: int,
        stage: int,
        number: int,
        n_items: int,
    ) -> Batch:
        config = self.config
        if config.stage_mixing == "batch":
            # One draw a micro-batch: one latent count, so one pass plan.
            stage = mixed_stage(stage, np.random.default_rng([config.seed, epoch, number, 1]))
        progress = epoch + number * config.batch_size_training / n_items
        rows = []
        for i in chunk:
            rng = item_rng(config.seed, epoch, int(i))
            drawn = draw_stage(config, stage, len(samples[i].steps), rng)
            rows.append(training_row(config, samples[i], drawn, self.markers, rng, progress))
        return collate(rows, self.tokenizer.pad_id, config.pad_multiple)

    def _resets(self, epoch: int, stage: int) -> bool:
        when = self.config.reset_optimizer
        if epoch == self.config.resume:
            return False
        before, last = stage_of_epoch(self.config, epoch - 1), n_stages(self.config)
        # Stages beyond the last are the same: nothing changes at their borders.
        return when == "epoch" or (when == "stage" and min(stage, last) != min(before, last))

    # ---- evaluation

    def evaluate_once(self) -> Evaluation:
        """Evaluate load_model_path at its stage; writes predictions.jsonl and summary.json."""
        with self.console:
            return self._evaluate_once()

    def _evaluate_once(self) -> Evaluation:
        stage, reason = evaluation_stage(self.config, self.made_with)
        self._greet()
        self.console.say(f"stage {stage} ({reason})")
        with self.backend.gathered():
            result = self._evaluate(stage, f"eval stage {stage}")
        for item, prediction in zip(self.val_items, result.predictions[:N_SHOWN], strict=False):
            asked = item["question"].replace("\n", " ").rsplit(". ", 1)[-1]
            mark = "right" if prediction["correct"] else f"wrong: {prediction['gold']}"
            answer = prediction["answer"] or "(no answer)"
            self.console.say(f"  {asked} | {prediction['n_latents']} thoughts | {answer} | {mark}")
        report(self.run, result, self.val_path)
        return result

    def _evaluation_due(self, epoch: int) -> bool:
        due = (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.num_epochs
        return due and epoch >= self.config.resume and str(epoch + 1) not in self.evaluations

    def _evaluate_epoch(self, epoch: int) -> None:
        config, stage = self.config, stage_of_epoch(self.config, epoch)
        with self.backend.gathered():
            loss = validation_loss(self.run, self.val, stage, epoch)
            result = self._evaluate(stage, f"eval  {epoch + 1:02d}/{config.num_epochs}")
        check_finite(self.run, REMEDY, {"epoch": epoch + 1}, validation_loss=loss)
        report(self.run, result, self.val_path, epoch, loss)
        self.evaluations[str(epoch + 1)] = {"accuracy": result.summary["accuracy"], "loss": loss}
        self.run.write(saving.EVALUATIONS, json.dumps(self.evaluations, indent=1))
        if self.run.reporter:
            self.run.reporter.draw()

    def _evaluate(self, stage: int, title: str) -> Evaluation:
        n = len(self.val) * (2 if self.swapped else 1)
        with self.console.progress(title, n) as bar:
            return evaluate(self.run, self.val_items, self.val, stage, self.swapped, bar.advance)

    def _swap(self) -> tuple[list[dict[str, Any]], list[Sample]] | None:
        """The validation items asking for the other name, if they are ProsQA's."""
        if not all("neg_target" in item for item in self.val_items):
            return None
        items = [prosqa.swap(item) for item in self.val_items]
        return items, tokenize(items, self.tokenizer, f"{self.val_path} (swapped)")

    # ---- checkpoints

    def _save(self, directory: Path, stage: int) -> None:
        config = self.config
        made = {
            "stage": stage,
            "c_thought": config.c_thought,
            "max_latent_stage": config.max_latent_stage,
            "pad_latent_to_max": config.pad_latent_to_max,
            "latent_growth": config.latent_growth,
            "labelled_thoughts": self.labels_thoughts,
        }
        state = {
            "epoch": self.epoch,
            "update_in_epoch": self.update_in_epoch,
            "n_updates": self.n_updates,
            "rows_per_update": self._rows_per_update,
        }
        save(self.run, directory, made, state)

    def _restore(self, directory: Path) -> None:
        state = read_state(self.run, directory, self._rows_per_update, "update_in_epoch")
        self.backend.load_optimizer(directory)
        self.epoch, self.update_in_epoch = state["epoch"], state["update_in_epoch"]
        self.n_updates = state["n_updates"]
        # Later ones are of checkpoints that are gone: what is trained again is measured again.
        found = saving.read_evaluations(self.run_dir).items()
        self.evaluations = {epoch: value for epoch, value in found if int(epoch) <= self.epoch}

    def _prune(self) -> None:
        keep, spare = self.config.keep_checkpoints, []
        if self.config.save_only_improve and not keep:
            keep = 1
        if self.evaluations:
            best = max(self.evaluations, key=lambda e: (self.evaluations[e]["accuracy"], -int(e)))
            spare = [self.run_dir / checkpoint.checkpoint_name(int(best))]
        prune(self.run, checkpoint.checkpoints, keep if self.evaluations else 0, spare)

    # ---- words

    def _greet(self) -> None:
        config, lines, continuing = self.config, [], None
        if self.world.size > 1:
            lines.append(processes_in_words(config, self.world.size))
        if self.resumed is not None:
            place = f"epoch {self.epoch + 1}, after {self.update_in_epoch} of its updates"
            continuing = f"{self.resumed}: {place}"
        elif config.resume and not config.only_eval:
            lines.append(
                f"resume {config.resume}: the first {config.resume} epochs of the schedule are"
                f" skipped; starts at epoch {config.resume + 1},"
                f" stage {stage_of_epoch(config, config.resume)}"
            )
        self.run.greet("", *lines, continuing=continuing)

    def _log_first_row(self, batch: Batch, epoch: int) -> None:
        """The published data_table: ids, labels and texts of the epoch's first row."""
        ids = batch.ids[0][batch.mask[0]].tolist()
        self.console.record(
            "data_table",
            epoch=epoch + 1,
            ids=ids,
            labels=batch.labels[0][batch.mask[0]].tolist(),
            texts=[self.tokenizer.decode([i], keep_markers=True) for i in ids],
        )
