"""The loop: stages, training, evaluation, saving, resuming. A back end does the computing."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coconut import files
from coconut.backend import MakeBackend
from coconut.batches.batch import Batch, chunks, collate, epoch_order
from coconut.batches.curriculum import (
    Row,
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
from coconut.batches.training_data import DEBUG_VALIDATION, TrainingData, TrainingSamples
from coconut.checkpoints import checkpoint
from coconut.checkpoints.source import LAST, newest_checkpoint, open_source
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.files import write_text
from coconut.reporting.console import N_SHOWN, Console
from coconut.reporting.report import Reporter
from coconut.run import ending
from coconut.run.evaluate import Evaluation, evaluate
from coconut.run.learning_rate import learning_rate
from coconut.run.start import check_same, processes_in_words
from coconut.world import World

N_FITTED = 512
"""Training items that a feedback rule's `linear` is fitted on, if it asks for that."""


class Runner:
    """One run: `train()` or `evaluate_once()`.

    world: the processes it is spread over, each with a Runner of its own that does the same. The
    first one writes all files and speaks.
    """

    def __init__(
        self,
        config: RunConfig,
        make_backend: MakeBackend,
        twin: str,
        world: World | None = None,
    ):
        self.config, self.twin, self.world = config, twin, world or World()
        self.run_dir = config.run_dir
        self.resumed = None if config.only_eval else self._find_resumed()
        opened = open_source(config, self.resumed)
        self.tokenizer, self.made_with = opened.tokenizer, opened.coconut
        # Once taught what to name, thoughts do so after further training without labels, too.
        self.labels_thoughts = bool((self.made_with or {}).get("labelled_thoughts"))
        self.markers = markers_of(self.tokenizer)
        files = [] if config.val_path is None else [config.val_path]
        check_same(self.world, config, opened.source, files)
        self._read_data()
        self._check_lengths(opened.source.n_positions)
        self.feedback = opened.source.feedback
        self.backend = make_backend(config, opened.source)
        self.epoch, self.update_in_epoch, self.n_updates = config.resume, 0, 0
        self.evaluations: dict[str, Any] = {}
        if self.resumed is not None:
            self._restore(self.resumed)
        self.world.wait()
        # Last: a run that cannot be continued leaves its directory as it was.
        self.console = Console(self.run_dir, rank=self.world.rank, tracked=config)
        self._write("config.yaml", config.to_yaml())
        draws = config.report and not config.only_eval and self.world.is_first
        self.reporter = Reporter(self.run_dir, self.console.say) if draws else None

    def _find_resumed(self) -> Path | None:
        """The checkpoint to continue from: the one that the first process sees."""
        found = newest_checkpoint(self.run_dir) if self.world.is_first else None
        first, *_ = self.world.exchange(None if found is None else str(found))
        return None if first is None else Path(first)

    def _read_data(self) -> None:
        """The validation items and the training data; val_path is where the items are from."""
        config = self.config
        self.val_path = str(config.val_path)
        self.val_items = read_items(self.val_path)
        if config.debug:
            self.val_items = self.val_items[:DEBUG_VALIDATION]
        self.val = tokenize(self.val_items, self.tokenizer, self.val_path)
        self.swapped = self._swap() if config.swap_test else None
        self.data: TrainingSamples = TrainingData(config, self.tokenizer, self.world)

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
        config = self.config
        self._greet()
        if self.resumed and self._evaluation_due(self.epoch - 1):
            self._evaluate_epoch(self.epoch - 1)  # the run was stopped between saving and this
        if self.feedback and self.feedback.rule.is_fitted and not self.feedback.is_trained:
            self.backend.fit_feedback(self._plain_text())
        while self.epoch < config.num_epochs:
            epoch, stage = self.epoch, stage_of_epoch(config, self.epoch)
            if self.update_in_epoch == 0 and self._resets(epoch, stage):
                self.backend.reset_optimizer()
            self._train_epoch(epoch, stage)
            self.epoch, self.update_in_epoch = epoch + 1, 0
            if not config.debug:
                self._save(self.run_dir / checkpoint.checkpoint_name(self.epoch), stage)
            if self._evaluation_due(epoch):
                self._evaluate_epoch(epoch)
            self._prune()
        if self.reporter:
            self.reporter.finish()
        self.console.close()

    def _train_epoch(self, epoch: int, stage: int) -> None:
        config, backend = self.config, self.backend
        samples = self.data.samples(epoch)
        self.labels_thoughts = self.labels_thoughts or any(s.thoughts for s in samples)
        order = epoch_order(len(samples), config.seed, epoch)
        groups = list(self._groups(order))
        total_updates = (config.num_epochs - config.resume) * len(groups)
        title = f"epoch {epoch + 1:02d}/{config.num_epochs} stage {stage}"
        with self.console.progress(title, len(groups)) as bar:
            bar.advance(self.update_in_epoch)
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
                if not math.isfinite(stats.loss) or not math.isfinite(stats.grad_norm):
                    items = [samples[i].idx for _, chunk in groups[number] for i in chunk]
                    self._stop_non_finite(epoch, number, items, stats.loss)
                self.n_updates += 1
                self.update_in_epoch = number + 1
                seconds = time.perf_counter() - start
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
                )
                bar.advance(1, loss=stats.loss)
                if config.save_every and not config.debug and not last:
                    if (number + 1) % config.save_every == 0:
                        self._save(self.run_dir / LAST, stage)

    @property
    def _rows_per_update(self) -> int:
        config = self.config
        return config.batch_size_training * config.gradient_accumulation_steps * self.world.size

    def _plain_text(self) -> Iterator[Batch]:
        """Some training items as ordinary text, without latents."""
        samples = self.data.samples(self.epoch)[:N_FITTED]
        for chunk in chunks(np.arange(len(samples)), self.config.batch_size_training):
            rows = []
            for sample in (samples[i] for i in chunk):
                ids = [*sample.question, *(t for s in sample.steps for t in s), *sample.answer]
                rows.append(Row(sample.idx, ids, None, -1, 0))
            yield collate(rows, self.tokenizer.pad_id)

    def _is_line(self, number: int) -> bool:
        """Whether an update gets a line on the terminal; every one is in log.jsonl."""
        return number == 0 or (number + 1) % self.config.log_every == 0

    def _groups(self, order: np.ndarray) -> Iterator[list[tuple[int, np.ndarray]]]:
        """Micro-batches (number, item numbers) of each update; the last group may be short."""
        numbered = list(enumerate(chunks(order, self.config.batch_size_training)))
        size = self.config.gradient_accumulation_steps * self.world.size
        for start in range(0, len(numbered), size):
            yield numbered[start : start + size]

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

    def _stop_non_finite(self, epoch: int, number: int, items: list[int], loss: float) -> None:
        self.console.event("non_finite", epoch=epoch + 1, step=number + 1, items=items)
        self.console.close()
        raise UserError(
            str(self.run_dir),
            f"loss {loss} at epoch {epoch + 1}, step {number + 1}, items {items}; lower lr, set"
            " max_grad_norm: 1, or look at these items; the last checkpoint is untouched",
        )

    # ---- evaluation

    def evaluate_once(self) -> Evaluation:
        """Evaluate load_model_path at its stage; writes predictions.jsonl and summary.json."""
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
        self._report(result, epoch=None, loss=None)
        self.console.close()
        return result

    def _evaluation_due(self, epoch: int) -> bool:
        due = (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.num_epochs
        return due and epoch >= self.config.resume and str(epoch + 1) not in self.evaluations

    def _evaluate_epoch(self, epoch: int) -> None:
        stage = stage_of_epoch(self.config, epoch)
        with self.backend.gathered():
            loss = self._validation_loss(stage, epoch)
            result = self._evaluate(stage, f"eval  {epoch + 1:02d}/{self.config.num_epochs}")
        self._report(result, epoch=epoch, loss=loss)
        self.evaluations[str(epoch + 1)] = {"accuracy": result.summary["accuracy"], "loss": loss}
        self._write("evaluations.json", json.dumps(self.evaluations, indent=1))
        if self.reporter:
            self.reporter.draw()

    def _validation_loss(self, stage: int, epoch: int) -> float:
        """Mean loss a label over the validation set, at the stage itself (no draws)."""
        config = self.config
        batches = list(chunks(np.arange(len(self.val)), config.batch_size_training))

        def loss_of(numbers: np.ndarray) -> tuple[float, int]:
            rows = [
                training_row(
                    config, self.val[i], stage, self.markers, item_rng(config.seed, 0, i), epoch + 1
                )
                for i in numbers
            ]
            part = self.backend.eval_loss(collate(rows, self.tokenizer.pad_id, config.pad_multiple))
            return part.loss_sum, part.n_targets

        # Added in the order of one process: the same sum to the last bit.
        losses, counts = zip(*self.world.deal(batches, loss_of), strict=True)
        return sum(losses) / max(sum(counts), 1)

    def _evaluate(self, stage: int, title: str) -> Evaluation:
        n = len(self.val) * (2 if self.swapped else 1)
        with self.console.progress(title, n) as bar:
            return evaluate(
                self.backend,
                self.config,
                self.tokenizer,
                self.val_items,
                self.val,
                stage,
                self.swapped,
                bar.advance,
                self.world,
            )

    def _report(self, result: Evaluation, epoch: int | None, loss: float | None) -> None:
        """Write predictions and summary, and say what came out."""
        config, s = self.config, result.summary
        s |= {
            "loss": loss,
            "epoch": None if epoch is None else epoch + 1,
            "method": config.method,
            **ending.measured_with(self.twin, self.backend, self.val_path),
            "checkpoint": (config.load_model_path or config.model_id)
            if epoch is None
            else str(self.run_dir),
        }
        lines = [json.dumps(p, ensure_ascii=False) for p in result.predictions]
        self._write("predictions.jsonl", "\n".join(lines) + "\n")
        self._write("summary.json", json.dumps(s, indent=2) + "\n")

        def share(name: str, n: int = s["n"]) -> tuple[int, int] | None:
            return (round(s[name] * n), n) if s.get(name) is not None else None

        self.console.event(
            "eval",
            epoch=s["epoch"],
            n_epochs=None if epoch is None else config.num_epochs,
            stage=s["stage"],
            loss=loss,
            answer=share("accuracy"),
            swapped=share("swapped_accuracy"),
            both=share("both_accuracy"),
            cot=share("cot_match", s.get("chains", 0)),
            new_tokens=s["new_tokens_per_question"],
            samples_per_second=s["samples_per_second"],
            peak_memory_bytes=s["peak_memory_bytes"],
        )
        if s.get("thoughts"):
            self.console.record("thoughts", epoch=s["epoch"], stage=s["stage"], **s["thoughts"])
        for name, count in s.get("outcomes", {}).items():
            self.console.say(f"  {name}: {count}")

    def _swap(self) -> tuple[list[dict[str, Any]], list[Sample]] | None:
        """The validation items asking for the other name, if they are ProsQA's."""
        if not all("neg_target" in item for item in self.val_items):
            return None
        from coconut.tasks import prosqa

        items = [prosqa.swap(item) for item in self.val_items]
        return items, tokenize(items, self.tokenizer, f"{self.val_path} (swapped)")

    # ---- checkpoints

    def _write(self, name: str, text: str) -> None:
        """A file of the run directory; written by the first process only."""
        if self.world.is_first:
            write_text(self.run_dir / name, text)

    def _save(self, directory: Path, stage: int) -> None:
        if self.world.is_first:
            self._save_first(directory, stage)
        else:
            self.world.wait()
            self.backend.save(None, with_optimizer=True)
        self.world.wait()

    def _save_first(self, directory: Path, stage: int) -> None:
        config, start = self.config, time.perf_counter()
        with checkpoint.write_atomically(directory) as partial:
            self.world.wait()  # the others hear of a disk that refuses, and give nothing
            self.backend.save(partial, with_optimizer=True)
            self.tokenizer.save(partial)
            files.write_json(
                partial / "coconut.json",
                {
                    "format_version": checkpoint.FORMAT_VERSION,
                    "method": config.method,
                    "feedback": self.feedback and str(self.feedback.rule),
                    "stage": stage,
                    "c_thought": config.c_thought,
                    "max_latent_stage": config.max_latent_stage,
                    "pad_latent_to_max": config.pad_latent_to_max,
                    "latent_growth": config.latent_growth,
                    "labelled_thoughts": self.labels_thoughts,
                    "latent_ids": None
                    if self.markers is None
                    else [self.markers.start, self.markers.end, self.markers.latent],
                },
            )
            files.write_json(
                partial / "trainer_state.json",
                {
                    "epoch": self.epoch,
                    "update_in_epoch": self.update_in_epoch,
                    "n_updates": self.n_updates,
                    "seed": config.seed,
                    "backend": self.twin,
                    "rows_per_update": self._rows_per_update,
                },
            )
        size = sum(f.stat().st_size for f in directory.iterdir())
        self.console.event(
            "saved", path=str(directory), bytes=size, seconds=time.perf_counter() - start
        )

    def _restore(self, directory: Path) -> None:
        state = files.read_json(directory / "trainer_state.json")
        if state["seed"] != self.config.seed:
            raise UserError(
                str(directory),
                f"was trained with seed {state['seed']}, not {self.config.seed}; choose another"
                " name for a new run",
            )
        rows = state.get("rows_per_update", self._rows_per_update)
        if state["update_in_epoch"] and rows != self._rows_per_update:
            raise UserError(
                str(directory),
                f"stands inside an epoch of updates of {rows} rows, now an update has"
                f" {self._rows_per_update}; batch_size_training * gradient_accumulation_steps *"
                f" processes must be {rows} to go on with it",
            )
        self.backend.load_optimizer(directory)
        self.epoch, self.update_in_epoch = state["epoch"], state["update_in_epoch"]
        self.n_updates = state["n_updates"]
        path = self.run_dir / "evaluations.json"
        if path.exists():
            # Later ones are of checkpoints that are gone: what is trained again is measured again.
            found = files.read_json(path).items()
            self.evaluations = {epoch: value for epoch, value in found if int(epoch) <= self.epoch}

    def _prune(self) -> None:
        if not self.world.is_first:
            return
        last = self.run_dir / LAST
        if last.is_dir():
            # By a rename first: killed halfway, it must not be taken for a checkpoint.
            last.rename(doomed := last.with_name(f".{LAST}.deleted-{os.getpid()}"))
            shutil.rmtree(doomed)
        keep = self.config.keep_checkpoints
        if self.config.save_only_improve and not keep:
            keep = 1
        if not keep or not self.evaluations:
            return
        best = max(self.evaluations, key=lambda e: (self.evaluations[e]["accuracy"], -int(e)))
        spare = self.run_dir / checkpoint.checkpoint_name(int(best))
        checkpoint.prune(checkpoint.checkpoints(self.run_dir), keep, [spare])

    # ---- words

    def _greet(self) -> None:
        config, b = self.config, self.backend
        adapter = config.adapter
        trained = f", {b.n_trained / 1e6:.2f}M trained ({adapter.type})" if adapter else ""
        self.console.say(
            f"{self.twin} | {b.model_type} {b.n_params / 1e6:.1f}M params{trained}"
            f" | {b.device} {b.dtype}"
            f" | run {config.name} | method {config.method} | seed {config.seed}"
        )
        if b.note:
            self.console.say(b.note)
        if self.world.size > 1:
            self.console.say(processes_in_words(config, self.world.size))
        if self.resumed is not None:
            self.console.say(
                f"continuing {self.resumed}: epoch {self.epoch + 1}, after"
                f" {self.update_in_epoch} of its updates"
            )
        elif config.resume and not config.only_eval:
            self.console.say(
                f"resume {config.resume}: the first {config.resume} epochs of the schedule are"
                f" skipped; starts at epoch {config.resume + 1},"
                f" stage {stage_of_epoch(config, config.resume)}"
            )

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
