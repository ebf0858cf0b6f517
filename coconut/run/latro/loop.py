"""THE LaTRO loop: warm start, sample, score, update, evaluate, save, resume.

Everything random follows from the seed and the number of the update, so a run that goes on from a
checkpoint draws what an unbroken one draws.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coconut import files
from coconut.backend import Decoding, MakeBackend
from coconut.batches.batch import chunks, collate, epoch_order
from coconut.batches.credit import credit
from coconut.batches.curriculum import markers_of
from coconut.batches.latro_prompts import Data, check_room, passes
from coconut.batches.rollouts import Rollout, RolloutBatch, collate_rollouts, exchanged
from coconut.checkpoints import checkpoint
from coconut.checkpoints.source import open_source
from coconut.config.latro_keys import LatroConfig
from coconut.errors import UserError
from coconut.files import write_text
from coconut.reporting.console import Console
from coconut.reporting.report import Reporter
from coconut.run import ending
from coconut.run.latro.resume import (
    WARM_START,
    checkpoints,
    plan_lines,
    resumed_from,
    warm_weights,
    whole_update,
)
from coconut.run.learning_rate import learning_rate
from coconut.run.start import check_same
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
        given, self.world = config, world or World()
        config = whole_update(config, self.world.size)
        self.config, self.twin, self.run_dir = config, twin, config.run_dir
        # As the first process sees it.
        found = [str(path or "") for path in (resumed_from(config), warm_weights(config))]
        (last, warm), *_ = self.world.exchange(found)
        self.resumed = Path(last) if last else None
        opened = open_source(config, Path(warm) if warm else None)
        self.tokenizer, self.feedback = opened.tokenizer, opened.source.feedback
        self.data = Data(config, self.tokenizer)
        self.warm_rows = self.data.written_rows() if config.warm_start_updates else []
        self.total = config.n_updates(len(self.data.train))
        check_room(self.data, self.data.splits, opened.source.n_positions)
        files = {self.data.questions.path(split) for split in self.data.splits}
        check_same(self.world, given, opened.source, files)
        self.backend = make_backend(config, opened.source)
        self.update, self.best, self.seconds = 0, 0.0, 0.0
        self.speed: dict[str, float] = {}
        self.is_warm = bool(last or warm)
        if self.is_warm:
            self._keep_reference()
        if self.resumed is not None:
            self._restore(self.resumed)
        self.world.wait()
        self.console = Console(self.run_dir, rank=self.world.rank, tracked=given)
        if self.world.is_first:
            write_text(self.run_dir / "config.yaml", given.to_yaml())
        draws = config.report and self.world.is_first
        self.reporter = Reporter(self.run_dir, self.console.say) if draws else None

    def _keep_reference(self) -> None:
        """Freeze the weights of now; without a KL term nobody asks for them."""
        if self.config.kl_coef:
            self.backend.keep_reference()

    # ---- training

    def train(self) -> None:
        """Warm start if asked for, then all updates that are left."""
        with self.console:
            self._train()

    def _train(self) -> None:
        config, b = self.config, self.backend
        self.console.say(
            f"{self.twin} | {b.model_type} {b.n_params / 1e6:.1f}M params | {b.device} {b.dtype}"
            f" | run {config.name} | latro, preset {config.preset} | seed {config.seed}"
        )
        for line in plan_lines(config, len(self.data.train), self.world.size):
            self.console.say(line)
        if self.resumed is not None:
            self.console.say(f"continuing {self.resumed}: after update {self.update}")
        if not self.is_warm:
            self._warm_start()
        if self.update == 0 and config.num_evaluations:
            self._evaluate()
        every = max(1, self.total // config.num_evaluations) if config.num_evaluations else 0
        while self.update < self.total:
            self._update(self.update)
            self.update += 1
            last = self.update == self.total
            # As published: after updates 1, 1 + every, ..., and the last one.
            if every and ((self.update - 1) % every == 0 or last):
                self._evaluate()
                if self.reporter:
                    self.reporter.draw()
            if last or self._save_is_due():
                self._save(self.run_dir / f"update_{self.update:04d}")
        if config.test_at_end:
            self._test()
        if self.reporter:
            self.reporter.finish()

    def _warm_start(self) -> None:
        """Supervised updates on prompt, written rationale, separator, answer."""
        config, rows = self.config, self.warm_rows
        size, n = config.warm_start_batch, config.warm_start_updates
        for u in range(n):
            order = [
                i
                for e in range(*passes(u, size, len(rows)))
                for i in epoch_order(len(rows), config.seed, e)
            ]
            start = u * size - passes(u, size, len(rows))[0] * len(rows)
            # Micro-batches of an update of LaTRO, so that several processes can share them.
            parts = list(chunks(np.array(order[start : start + size]), config.batch_size_training))
            batches = [
                collate([rows[i] for i in part], self.tokenizer.pad_id, config.pad_multiple)
                for part in self.world.share(parts)
            ]
            lr = config.warm_start_lr * min(1.0, (u + 1) / 20)
            stats = self.backend.train_step(batches, lr, (config.seed, u))
            self._check_finite(f"warm start, step {u + 1}", "warm_start_lr", stats.loss)
            say = self.console.event if u == 0 or (u + 1) % 100 == 0 else self.console.record
            say("warm_start", step=u + 1, n_steps=n, loss=stats.loss, grad_norm=stats.grad_norm)
        self.backend.reset_optimizer()
        if n:
            self._check_weights("the warm start", "warm_start_lr")
            self._write(self.run_dir / WARM_START, with_optimizer=False)
        self._keep_reference()

    def _update(self, u: int) -> None:
        config, backend, start = self.config, self.backend, time.perf_counter()
        backend.memory()
        items = self.data.prompts_of(u)
        rollouts, drawn = self._sample(items, u)
        K, B = config.rloo_k, len(rollouts)
        scored = time.perf_counter()
        n_sampled = sum(map(len, drawn))
        said, rewards, ref, entropies, n_said, n_answer = self._score(rollouts)
        earned = credit(
            rewards,
            said,
            ref,
            np.array([r.is_finished for r in rollouts]),
            K,
            config.kl_coef,
            config.penalty_mode if config.non_stop_penalty else None,
            config.penalty_reward_value,
        )
        order = np.random.default_rng([config.seed, u, 1]).permutation(B)
        batches = [
            self._collate(
                [rollouts[i] for i in part],
                advantages=earned.advantages[part],
                answer_weight=config.sft_penalty,
                n_rows=B,
            )
            for part in self.world.share(list(chunks(order, config.batch_size_training)))
        ]
        lr = learning_rate(config, u, self.total)
        stats = backend.policy_step(batches, lr)
        own = [batch.sums(x)[0].tolist() for batch, x in zip(batches, stats.logprobs, strict=True)]
        updated = np.concatenate(self.world.collect(own))
        seconds = time.perf_counter() - start
        self.seconds += seconds
        groups = earned.adjusted.reshape(-1, K).std(axis=1)
        finished = sum(r.is_finished for r in rollouts)
        log_ratio = said - ref
        fields: dict[str, Any] = {
            "objective/kl_penalty": earned.kl_penalty.mean(),
            "objective/rlhf_reward": earned.adjusted.mean(),
            "objective/advantage_avg": earned.advantages.mean(),
            "loss/policy_avg": -(earned.advantages * said).mean(),
            "loss/sft_avg": -rewards.mean(),
            "val/num_stop_tokens": finished,
            "val/perc_finished_thoughts": finished / B,
            "val/avg_rationale_length": np.mean([r.n_said for r in rollouts]),
            "lr": lr,
            "episode": (u + 1) * B,
            "eps": int((u + 1) * B / max(self.seconds, 1e-9)),
            "objective/reward": rewards.mean(),
            "objective/reward_per_token": rewards.sum() / max(n_answer, 1),
            "objective/kl": log_ratio.mean(),
            "objective/kl_per_token": log_ratio.sum() / max(n_said, 1),
            "objective/group_std": groups.mean(),
            "objective/zero_variance_groups": np.mean(groups < 1e-8),
            "objective/entropy": entropies / max(n_said, 1),
            "objective/on_policy_gap": abs(updated - said[order]).max(),
            "grad_norm": stats.grad_norm,
            "rollout_seconds": scored - start,
            "samples_per_second": B / seconds,
            "tokens_per_second": n_sampled / seconds,
            "peak_memory_bytes": max(self.world.exchange(backend.memory())),
        }
        self.speed = {name: float(fields[name]) for name in SPEED}
        prompt_epoch = (u + 1) * config.n_prompts / len(self.data.train)
        self.console.record("train", step=u + 1, n_steps=self.total, epochs=prompt_epoch, **fields)
        if u == 0 or (u + 1) % config.log_every == 0 or u + 1 == self.total:
            self.console.say(
                f"update {u + 1:04d}/{self.total:04d} | reward {rewards.mean():.3f}"
                f" | kl {log_ratio.mean():.3f} | finished {100 * finished / B:.0f}%"
                f" | length {fields['val/avg_rationale_length']:.1f}"
                f" | grad {stats.grad_norm:.2f} | {B / seconds:.0f} samples/s,"
                f" {n_sampled / seconds:.0f} tok/s | {fields['peak_memory_bytes'] / 1e9:.2f} GB"
            )
            self._log_table(rollouts, drawn, earned)
        self._check_finite(f"update {u + 1}", "lr", stats.grad_norm, rewards.sum())

    def _check_weights(self, when: str, rate: str) -> None:
        """Raise UserError if the weights of now give no likelihoods: nothing is written of them."""
        item = self.data.train[0]
        rollout = self.data.rollout(self.data.prompt(item), [], item)
        scores = self.backend.score(self._collate([rollout]))
        self._check_finite(f"after {when}", rate, scores.logprobs.sum())

    def _check_finite(self, when: str, rate: str, *values: float) -> None:
        if not all(map(math.isfinite, values)):
            raise UserError(
                str(self.run_dir),
                f"{when}: the loss, reward or gradient is not finite; lower {rate} or set"
                " max_grad_norm: 1; checkpoints of before are untouched",
            )

    def _sample(
        self, items: Sequence[dict[str, Any]], u: int
    ) -> tuple[list[Rollout], list[list[int]]]:
        """K rollouts of every item, groups adjacent; and the tokens that were drawn."""
        config, d = self.config, self.data
        prompts = [d.prompt(item) for item in items]
        decoding = Decoding(
            config.response_length,
            d.questions.end_id,
            config.temperature,
            config.seed,
            d.stops.ended,
        )
        source = np.repeat(np.arange(len(items)), config.rloo_k)

        def draw(part: np.ndarray) -> list[list[int]]:
            used = np.unique(source[part])
            batch = collate([prompts[i] for i in used], self.tokenizer.pad_id)
            streams = [(u, int(row)) for row in part]
            found = self.backend.sample(
                batch, decoding, np.searchsorted(used, source[part]), streams
            )
            return [row.tokens for row in found]

        parts = list(chunks(np.arange(len(source)), config.rollout_batch_size))
        drawn = [tokens for part in self.world.deal(parts, draw) for tokens in part]
        rollouts = [
            d.rollout(prompts[i], tokens, items[i])
            for i, tokens in zip(source.tolist(), drawn, strict=True)
        ]
        return rollouts, drawn

    def _score(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, int, int]:
        """(policy's and answer's log-probabilities, the reference's, summed entropy, tokens said,
        tokens of answers)."""

        def scored(part: np.ndarray) -> list[Any]:
            batch = self._collate([rollouts[i] for i in part])
            scores = self.backend.score(batch)
            z, y = batch.sums(scores.logprobs)
            ref = z
            if self.config.kl_coef:
                ref = batch.sums(self.backend.score(batch, of_reference=True).logprobs)[0]
            entropies = float(batch.sums(scores.entropies)[0].sum())
            n_answer = int(batch.target_is_answer[: batch.n_real].sum())
            counts = (entropies, batch.n_real - n_answer, n_answer)
            return [z.tolist(), y.tolist(), ref.tolist(), *counts]

        parts = list(chunks(np.arange(len(rollouts)), self.config.rollout_batch_size))
        said, rewards, ref, *sums = zip(*self.world.deal(parts, scored), strict=True)
        joined = (np.concatenate(x) for x in (said, rewards, ref))
        return (*joined, *map(sum, sums))  # type: ignore[return-value]

    def _collate(self, rollouts: Sequence[Rollout], **weights: Any) -> RolloutBatch:
        config = self.config
        return collate_rollouts(
            rollouts,
            self.tokenizer.pad_id,
            config.pad_multiple,
            config.reward_offset,
            config.temperature,
            **weights,
        )

    def _log_table(self, rollouts: Sequence[Rollout], drawn: Any, earned: Any) -> None:
        decode = self.tokenizer.decode
        rows = [
            {
                "query": decode(r.prompt),
                "response": decode(tokens),
                "truncated": decode(tokens[: r.n_said]),
                "answer": decode(r.answer),
                "assembled": decode(r.prompt + r.shared + r.bridge + r.answer),
                "reward": float(earned.rewards[i]),
                "advantage": float(earned.advantages[i]),
            }
            for i, (r, tokens) in enumerate(zip(rollouts[:N_TABLE], drawn[:N_TABLE], strict=True))
        ]
        self.console.record("training_samples", step=self.update + 1, rows=rows)

    # ---- evaluation

    def _evaluate(self) -> None:
        self._check_weights(f"update {self.update}", "lr")
        found = self._answers(self.data.validation[: self.config.evaluation_items])
        rows = found.pop("rows")
        self.console.record("evaluations", step=self.update, rows=rows[:N_TABLE])
        self.console.record("eval", step=self.update, n_steps=self.total, **found)
        self.console.say(_eval_line(f"eval after update {self.update:04d}", found))
        self._summarise(found)
        if found["eval/zero_shot_acc"] > self.best:
            self.best = found["eval/zero_shot_acc"]
            self._write(self.run_dir / BEST, with_optimizer=False)

    def _summarise(self, found: dict[str, Any]) -> None:
        """Write summary.json: where the run stands, on what, and how fast its updates are."""
        data = self.data.questions.path("validation")
        summary = {
            "method": "latro",
            **ending.measured_with(self.twin, self.backend, data),
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
        if self.world.is_first:
            files.write_json(self.run_dir / "summary.json", summary)

    def _test(self) -> None:
        """The best checkpoint on the test split, once for the run."""
        path, best = self.run_dir / "test.json", self.run_dir / BEST
        (is_done, has_best), *_ = self.world.exchange([path.exists(), best.is_dir()])
        if is_done:
            self.console.say(f"{path} is there already: the test split is answered once for a run")
            return
        if has_best:
            self.backend.restore(best)
        data = self.data.questions.path("test")
        found = self._answers(self.data.test)
        del found["rows"]
        if self.world.is_first:
            about = {
                "checkpoint": str(best) if has_best else "last",
                **ending.measured_with(self.twin, self.backend, data),
            }
            files.write_json(path, found | about)
        self.console.event(
            "test", path=str(path), n=found["n"], accuracy=found["eval/zero_shot_acc"]
        )
        self.console.say(_eval_line("test", found))

    def _answers(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Greedy answers, and the answer's likelihood after its own, another's and no rationale."""
        config, d = self.config, self.data
        decoding = Decoding(
            config.response_length,
            d.questions.end_id,
            stops=lambda tokens: tokens[-1] in d.questions.stop_ids,
        )
        prompts = [d.prompt(item) for item in items]

        def said(part: np.ndarray) -> list[list[int]]:
            batch = collate([prompts[i] for i in part], self.tokenizer.pad_id)
            return self.backend.generate(batch, decoding)

        parts = list(chunks(np.arange(len(items)), config.eval_batch_size))
        outputs = [tokens for part in self.world.deal(parts, said) for tokens in part]
        own = [d.rollout(*x) for x in zip(prompts, outputs, items, strict=True)]
        kinds = exchanged(own, d.separator_ids).values()
        rewards = [self._score(kind)[1].mean() for kind in kinds]
        texts = [self.tokenizer.decode(tokens) for tokens in outputs]
        judged = [d.questions.judge(text, item) for text, item in zip(texts, items, strict=True)]
        right = [one["correct"] for one in judged]
        return {
            "eval/zero_shot_acc": float(np.mean(right)),
            "answer_rule": config.answer_rule,
            "accuracy_corrected": float(np.mean([one["correct_corrected"] for one in judged])),
            "accuracy_released": float(np.mean([one["correct_released"] for one in judged])),
            "objective/eval_reward": float(rewards[0]),
            "eval/reward_shuffled": float(rewards[1]),
            "eval/reward_empty": float(rewards[2]),
            "eval/finished": float(np.mean([r.is_finished for r in own])),
            "n": len(items),
            "rows": [
                {
                    "query": item["queries"],
                    "response": text,
                    "truncated": self.tokenizer.decode(tokens[: r.n_said]),
                    "gold": item["gold"],
                    "answer": one["answer"],
                    "correct": one["correct"],
                }
                for item, text, tokens, r, one in zip(
                    items, texts, outputs, own, judged, strict=True
                )
            ],
        }

    # ---- checkpoints

    def _save_is_due(self) -> bool:
        steps = self.config.save_steps
        every = math.ceil(steps * self.total) if 0 < steps < 1 else int(steps)
        return bool(every) and self.update % every == 0

    def _save(self, directory: Path) -> None:
        start = time.perf_counter()
        self._check_weights(f"update {self.update}", "lr")
        self._write(directory, with_optimizer=True)
        if not self.world.is_first or self.config.debug:
            return
        if self.config.keep_checkpoints:
            checkpoint.prune(checkpoints(self.run_dir), self.config.keep_checkpoints)
        size = sum(f.stat().st_size for f in directory.iterdir())
        self.console.event(
            "saved", path=str(directory), bytes=size, seconds=time.perf_counter() - start
        )

    def _write(self, directory: Path, with_optimizer: bool) -> None:
        if self.config.debug:
            return
        if self.world.is_first:
            self._write_first(directory, with_optimizer)
        else:
            self.world.wait()
            self.backend.save(None, with_optimizer)
        self.world.wait()

    def _write_first(self, directory: Path, with_optimizer: bool) -> None:
        config = self.config
        m = markers_of(self.tokenizer)
        with checkpoint.write_atomically(directory) as partial:
            self.world.wait()  # the others hear of a disk that refuses
            self.backend.save(partial, with_optimizer=with_optimizer)
            self.tokenizer.save(partial)
            files.write_json(
                partial / "coconut.json",
                {
                    "format_version": checkpoint.FORMAT_VERSION,
                    "method": "latro",
                    "feedback": self.feedback and str(self.feedback.rule),
                    "stage": 1 if m else 0,
                    "c_thought": config.latro_latents,
                    "max_latent_stage": 1,
                    "latent_ids": [m.start, m.end, m.latent] if m else None,
                },
            )
            files.write_json(
                partial / "trainer_state.json",
                {
                    "epoch": 0,
                    "update_in_epoch": self.update,
                    "n_updates": self.update,
                    "total_updates": self.total,
                    "best_accuracy": self.best,
                    "seed": config.seed,
                    "backend": self.twin,
                    "rows_per_update": config.local_batch,
                    "held_out": self._held_out(),
                },
            )

    def _held_out(self) -> str:
        """A digest of the validation questions."""
        text = "\n".join(item["queries"] for item in self.data.validation)
        return hashlib.sha256(text.encode()).hexdigest()

    def _restore(self, directory: Path) -> None:
        state = files.read_json(directory / "trainer_state.json")
        if state["seed"] != self.config.seed:
            raise UserError(
                str(directory),
                f"was trained with seed {state['seed']}, not {self.config.seed}; choose another"
                " run_name for a new run",
            )
        rows = state.get("rows_per_update", self.config.local_batch)
        if state["n_updates"] and rows != self.config.local_batch:
            raise UserError(
                str(directory),
                f"was trained with updates of {rows} rollouts, now an update has"
                f" {self.config.local_batch}; batch_size_training * gradient_accumulation_steps *"
                f" processes must be {rows} to go on with it",
            )
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
            self.best = state["best_accuracy"]


def _eval_line(title: str, found: dict[str, Any]) -> str:
    return (
        f"{title} | accuracy {100 * found['eval/zero_shot_acc']:.1f}%"
        f" | reward {found['objective/eval_reward']:.3f}, shuffled"
        f" {found['eval/reward_shuffled']:.3f}, empty {found['eval/reward_empty']:.3f}"
        f" | n {found['n']}"
    )


def read_curve(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind of a run's log."""
    lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]
