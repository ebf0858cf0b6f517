"""THE LaTRO loop: warm start, sample, score, update, evaluate, save, resume.

Everything random follows from the seed and the number of the update, so a run that goes on from a
checkpoint draws what an unbroken one draws.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from coconut.backend import MakeBackend
from coconut.batches.batch import chunks, collate
from coconut.batches.curriculum import markers_of
from coconut.batches.latro_prompts import Data, check_room, numbers_of
from coconut.checkpoints import checkpoint
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.run.ending import check_finite, measured_with, memory_used, test_once, write_results
from coconut.run.latro.answers import answers, in_words
from coconut.run.latro.diagnostics import best_and_worst, measures
from coconut.run.latro.draw_and_score import Rollouts
from coconut.run.latro.policy_update import Round, draw_round, step
from coconut.run.latro.resume import (
    REFERENCE,
    WARM_START,
    checkpoints,
    plan_lines,
    reference_weights,
    references,
    resumed_from,
    whole_update,
)
from coconut.run.learning_rate import learning_rate
from coconut.run.saving import prune, read_state, save
from coconut.run.start import Run, agreed_paths
from coconut.world import World

BEST = "best"
N_TABLE = 4
"""Rollouts of an update that go into the log as texts."""
SPEED = ("samples_per_second", "tokens_per_second", "rollout_seconds", "peak_memory_bytes")


class LatroRunner:
    """One LaTRO run: `train()`.

    world: the processes it is spread over, each with a LatroRunner of its own that does the same.
    What is computed is what one process computes, whose batches are dealt out. The first process
    writes all files and speaks.
    """

    def __init__(
        self,
        config: LatroConfig,
        make_backend: MakeBackend,
        twin: str,
        world: World | None = None,
    ):
        self.world, self.run_dir = world or World(), config.run_dir
        self.config = whole = whole_update(config, self.world.size)
        if self.world.is_first:
            checkpoint.recover(self.run_dir)
        resumed = resumed_from(whole)
        reference = reference_weights(whole, resumed)
        self.resumed, warm = agreed_paths(self.world, resumed, reference)
        self.run = run = Run(config, twin, self.world, warm, self.resumed)
        self.tokenizer = run.tokenizer
        self.data = Data(whole, self.tokenizer)
        self.warm_rows = self.data.written_rows() if config.warm_start_updates else []
        self.total = whole.n_updates(len(self.data.train))
        check_room(self.data, self.data.splits, run.source.n_positions)
        run.agree({self.data.path(split) for split in self.data.splits})
        self.backend = run.build(make_backend)
        self.rollouts = Rollouts(whole, self.backend, self.data, self.world)
        self.update, self.best, self.seconds = 0, 0.0, 0.0
        self.speed: dict[str, float] = {}
        self.is_warm = bool(self.resumed or warm)
        if self.is_warm:
            self._keep_reference()
        if self.resumed is not None:
            self._restore(self.resumed)
        self.console = run.begin(draws=True)

    def _keep_reference(self) -> None:
        """Freeze the weights of now; without a KL term nobody asks for them."""
        if self.config.kl_coef:
            self.backend.keep_reference()

    def _renew_reference(self) -> None:
        """The weights of now become the reference, written for a run that is gone on with."""
        self._keep_reference()
        name = REFERENCE.format
        self._save(self.run_dir / name(self.update), with_optimizer=False)
        updates = [int(p.name[7:]) for p in checkpoints(self.run_dir)]
        every = self.config.reference_every
        needed = [self.run_dir / name(u // every * every) for u in updates]
        prune(self.run, references, 1, needed)

    # ---- training

    def train(self) -> None:
        """Warm start if asked for, then all updates that are left."""
        with self.run.opened():
            self._train()

    def _train(self) -> None:
        config = self.config
        done = f"{self.resumed}: after update {self.update}" if self.resumed else None
        lines = plan_lines(config, len(self.data.train), self.world.size)
        self.run.greet(f", preset {config.preset}", *lines, continuing=done)
        if self.resumed:  # it may have been stopped between saving and this
            prune(self.run, checkpoints, config.keep_checkpoints)
        if not self.is_warm:
            self._warm_start()
        if self.update == 0 and config.num_evaluations:
            self._evaluate()
        every = max(1, self.total // config.num_evaluations) if config.num_evaluations else 0
        while self.update < self.total:
            self._update(self.update)
            self.update += 1
            last = self.update == self.total
            if config.reference_every and self.update % config.reference_every == 0:
                self._renew_reference()
            # As published: after updates 1, 1 + every, ..., and the last one.
            if every and ((self.update - 1) % every == 0 or last):
                self._evaluate()
                if self.run.reporter:
                    self.run.reporter.draw()
            if last or self._save_is_due():
                self._save(self.run_dir / f"update_{self.update:04d}")
        if config.test_at_end:
            data = self.data.path("test")
            test_once(self.run, self.run_dir / BEST, data, self._answer_test)

    def _warm_start(self) -> None:
        """Supervised updates on prompt, written rationale, separator, answer."""
        config, rows = self.config, self.warm_rows
        size, n = config.warm_start_batch, config.warm_start_updates
        for u in range(n):
            numbers = np.array(numbers_of(u, size, len(rows), config.seed))
            # Micro-batches of an update of LaTRO, so that several processes can share them.
            parts = list(chunks(numbers, config.batch_size_training))
            batches = [
                collate([rows[i] for i in part], self.tokenizer.pad_id, config.pad_multiple)
                for part in self.world.share(parts)
            ]
            lr = config.warm_start_lr * min(1.0, (u + 1) / 20)
            stats = self.backend.train_step(batches, lr, (config.seed, u))
            self._check_finite({"warm_start": u + 1}, loss=stats.loss)
            say = self.console.event if u == 0 or (u + 1) % 100 == 0 else self.console.record
            say("warm_start", step=u + 1, n_steps=n, loss=stats.loss, grad_norm=stats.grad_norm)
        self.backend.reset_optimizer()
        if n:
            self._check_weights({"warm_start": n})
            self._save(self.run_dir / WARM_START, with_optimizer=False)
        self._keep_reference()

    def _update(self, u: int) -> None:
        config, start = self.config, time.perf_counter()
        self.backend.memory()
        drawn = draw_round(self.rollouts, self.data.prompts_of(u), u)
        lr = learning_rate(config, u, self.total)
        stepped = step(self.rollouts, drawn, u, lr)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        B, n_sampled = len(drawn.rollouts), sum(map(len, drawn.drawn))
        fields = measures(config, drawn, stepped) | {
            "lr": lr,
            "episode": (u + 1) * B,
            "eps": int((u + 1) * B / max(self.seconds, 1e-9)),
            "rollout_seconds": drawn.seconds,
            "samples_per_second": B / seconds,
            "tokens_per_second": n_sampled / seconds,
            **memory_used(self.world, self.backend),
        }
        self.speed = {name: float(fields[name]) for name in SPEED}
        prompt_epoch = (u + 1) * config.n_prompts / len(self.data.train)
        self.console.record("train", step=u + 1, n_steps=self.total, epochs=prompt_epoch, **fields)
        if u == 0 or (u + 1) % config.log_every == 0 or u + 1 == self.total:
            self.console.say(
                f"update {u + 1:04d}/{self.total:04d} | reward {fields['objective/reward']:.3f}"
                f" | kl {fields['objective/kl']:.3f}"
                f" | finished {100 * fields['val/perc_finished_thoughts']:.0f}%"
                f" | length {fields['val/avg_rationale_length']:.1f}"
                f" | grad {stepped.grad_norm:.2f} | {B / seconds:.0f} samples/s,"
                f" {n_sampled / seconds:.0f} tok/s | {fields['peak_memory_bytes'] / 1e9:.2f} GB"
            )
            self._log_table(drawn)
        where = {"update": u + 1}
        reward = float(drawn.earned.rewards.sum())
        self._check_finite(where, gradient=stepped.grad_norm, reward=reward)

    def _check_weights(self, where: dict[str, int]) -> None:
        """Raise UserError if the weights of now give no likelihoods: nothing is written of them."""
        item = self.data.train[0]
        rollout = self.data.rollout(self.data.prompt(item), [], item)
        scores = self.backend.score(self.rollouts.collate([rollout]))
        self._check_finite(where, likelihood=float(scores.logprobs.sum()))

    def _check_finite(self, where: dict[str, int], **values: float) -> None:
        rate = "warm_start_lr" if "warm_start" in where else "lr"
        check_finite(self.run, f"lower {rate} or set max_grad_norm: 1", where, **values)

    def _log_table(self, drawn: Round) -> None:
        decode = self.tokenizer.decode
        rows = [
            {
                "query": decode(r.prompt),
                "response": decode(tokens),
                "truncated": decode(tokens[: r.n_said]),
                "answer": decode(r.answer),
                "assembled": decode(r.prompt + r.shared + r.bridge + r.answer),
                "reward": float(drawn.earned.rewards[i]),
                "advantage": float(drawn.earned.advantages[i]),
            }
            for i, (r, tokens) in enumerate(
                zip(drawn.rollouts[:N_TABLE], drawn.drawn[:N_TABLE], strict=True)
            )
        ]
        at = self.update + 1
        self.console.record("training_samples", step=at, rows=rows)
        self.console.record("rationales", step=at, rows=best_and_worst(drawn, decode))

    # ---- evaluation

    def _evaluate(self) -> None:
        self._check_weights({"update": self.update})
        found = answers(self.rollouts, self.data.validation[: self.config.evaluation_items])
        rows, warning = found.pop("rows"), found.pop("warning")
        self.console.record("evaluations", step=self.update, rows=rows[:N_TABLE])
        self.console.record("eval", step=self.update, n_steps=self.total, **found)
        self.console.say(in_words(f"eval after update {self.update:04d}", found))
        if warning and self.update:
            self.console.event("warning", message=warning)
        self._summarise(found)
        if found["eval/zero_shot_acc"] > self.best:
            self.best = found["eval/zero_shot_acc"]
            self._save(self.run_dir / BEST, with_optimizer=False)

    def _summarise(self, found: dict[str, Any]) -> None:
        """Write summary.json: where the run stands, on what, and how fast its updates are."""
        summary = {
            **measured_with(self.run, self.data.path("validation")),
            "checkpoint": str(self.run_dir),
            "update": self.update,
            "n_updates": self.total,
            "n": found["n"],
            "accuracy": found["eval/zero_shot_acc"],
            "reward": found["objective/eval_reward"],
            "reward_shuffled": found["eval/reward_shuffled"],
            "reward_empty": found["eval/reward_empty"],
            "finished": found["eval/finished"],
            # Of the last update; an evaluation before the first one has none.
            **{name: self.speed.get(name) for name in SPEED},
        }
        write_results(self.run, summary)

    def _answer_test(self) -> tuple[dict[str, Any], float]:
        found = answers(self.rollouts, self.data.test)
        del found["rows"], found["warning"]
        self.console.say(in_words("test", found))
        return found, found["eval/zero_shot_acc"]

    # ---- checkpoints

    def _save_is_due(self) -> bool:
        steps = self.config.save_steps
        every = math.ceil(steps * self.total) if 0 < steps < 1 else int(steps)
        return bool(every) and self.update % every == 0

    def _save(self, directory: Path, with_optimizer: bool = True) -> None:
        if with_optimizer:
            self._check_weights({"update": self.update})
        has_latents = markers_of(self.tokenizer) is not None
        thoughts = self.config.latro_latents
        made = {"stage": int(has_latents), "c_thought": thoughts, "max_latent_stage": 1}
        state = {
            "epoch": 0,
            "update_in_epoch": self.update,
            "n_updates": self.update,
            "total_updates": self.total,
            "best_accuracy": self.best,
            "rows_per_update": self.config.local_batch,
            "held_out": self._held_out(),
        }
        save(self.run, directory, made, state, with_optimizer)
        prune(self.run, checkpoints, self.config.keep_checkpoints if with_optimizer else 0)

    def _held_out(self) -> str:
        """A digest of the validation questions."""
        text = "\n".join(item["queries"] for item in self.data.validation)
        return hashlib.sha256(text.encode()).hexdigest()

    def _restore(self, directory: Path) -> None:
        state = read_state(self.run, directory, self.config.local_batch, "n_updates")
        own = directory.parent == self.run_dir
        if own and state.get("held_out", self._held_out()) != self._held_out():
            raise UserError(
                str(directory),
                "was trained while other questions were held out for validation; put the data,"
                " validation_items and split_seed back, or choose another run_name for a new run",
            )
        self.backend.restore(directory)
        self.backend.load_optimizer(directory)
        self.update = state["n_updates"]
        if own:  # what another run found best is not kept here
            self.best = float(state.get("best_accuracy", 0))


def read_curve(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind of a run's log."""
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]
