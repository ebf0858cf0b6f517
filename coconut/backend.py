"""The back end of both twins, at the grain of one optimizer update.

The loops in this package decide when something happens; a back end decides how. Nothing but numpy
arrays, numbers, strings and paths crosses. What is no array code is done here, once; the rest by
the modules of a `Twin`, which have the same names in both.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding
from coconut.batches.results import LossSum, PolicyStats, Sampled, Scores, StepStats, Trace
from coconut.batches.rollouts import RolloutBatch
from coconut.checkpoints.initial import grown_rows, initial_weights
from coconut.checkpoints.model_files import save_config, save_weights
from coconut.checkpoints.source import Source
from coconut.config.keys import WITH_FEEDBACK, RunConfig
from coconut.feedback.measures import Table, add_to
from coconut.feedback.statistics import ThoughtStatistics
from coconut.world import World


@dataclass(frozen=True)
class Twin:
    """The modules of a twin that its back end calls."""

    models: ModuleType
    weights: ModuleType
    adapters: ModuleType
    arrays: ModuleType
    feedback: ModuleType
    latent: ModuleType
    generate: ModuleType
    look_inside: ModuleType
    train: ModuleType
    latro: ModuleType


class Backend:
    """A model on a device, its optimizer, and what the loop asks of them."""

    name: str
    """mlx_coconut or cuda_coconut."""
    twin: Twin
    device: str
    note: str
    """A line for the log about the libraries underneath; may be empty."""
    uses_tf32: bool
    """Whether products of float32 matrices are rounded to TF32."""

    def __init__(self, config: RunConfig, source: Source, world: World | None = None):
        self.config = dict(source.config)
        self.dtype = "bfloat16" if config.bf16 else "float32"
        self.dtype += " with TF32 products" * self.uses_tf32
        self.model_type: str = self.config["model_type"]
        self.n_positions = source.n_positions
        self.adapter = source.adapter
        self.feeds_back = config.method in WITH_FEEDBACK
        if source.feedback and source.feedback.rule.is_token:
            self.feeds_back = False  # every latent keeps its embedding: one pass suffices
        self._open(config, source)
        self.n_params = self.twin.adapters.n_numbers(self.model)
        self.naming = self.module
        if self.adapter is not None:
            self.naming = self.twin.adapters
            self.naming.adapt(self.model, self.config, self.adapter)
            if self.adapter.directory is not None:
                self.naming.load(self.model, self.config, self.adapter)
        if self.feeds_back:
            self._attach_rule(config, source)
        self.n_params += _n_numbers(self.twin.weights.feedback_weights(self.model))
        self.n_trained = _n_numbers(self.twin.weights.trained_weights(self.model))
        """How many of n_params, or of an adapter beside them, an update changes."""
        self.trainer = self._make_trainer(
            config,
            weight_decay=config.weight_decay,
            beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            feeds_back=self.feeds_back,
            checkpointing=config.gradient_checkpointing,
            feedback_rate=config.feedback_lr_multiplier,
            world=world,
        )
        self.policy = self.twin.latro.Policy(self.trainer)
        self.statistics = ThoughtStatistics() if config.measure_thoughts else None
        self._table: Table | None = None
        """Of the embedding, for `measure`; None: the weights have changed since."""
        self._compiled = (0, 0.0)

    def _open(self, config: RunConfig, source: Source) -> None:
        """Build the model and give it a checkpoint's weights, or random ones."""
        if source.directory is not None:
            self.model, self.module, _ = self.twin.weights.load_model(source.directory)
            if source.vocab_size > self.config["vocab_size"] or source.new_tokens:
                self._grow(source, config.seed if self.adapter is None else self.adapter.seed)
            return
        self.config["vocab_size"] = source.vocab_size
        self.model, self.module = self.twin.models.build(self.config, "model_config_path")
        empty = self.twin.weights.hf_weights(self.model, self.module)
        shapes = {name: tuple(w.shape) for name, w in empty.items()}
        self._set(initial_weights(shapes, self.config, config.seed), "random weights")

    def _grow(self, source: Source, seed: int) -> None:
        """Rebuild the model around a larger embedding: resized first, then rows written."""
        hf = self.twin.weights.to_numpy(self.twin.weights.hf_weights(self.model, self.module))
        for name in self.module.VOCABULARY_ROWS:
            if name in hf:
                n = max(source.vocab_size, len(hf[name]))
                hf[name] = grown_rows(hf[name], n, source.copy_from, source.new_tokens, seed)
                self.config["vocab_size"] = n
        self.model, self.module = self.twin.models.build(self.config, "config.json")
        self._set(hf, "grown embedding")

    def _set(self, hf: Mapping[str, np.ndarray], what: str) -> None:
        own = self.module.sanitize(self.twin.weights.from_numpy(hf))
        self.twin.weights.set_weights(self.model, own, what)

    def _attach_rule(self, config: RunConfig, source: Source) -> None:
        made_in, trained = source.directory, None
        if self.adapter is not None and self.adapter.directory is not None:
            made_in = self.adapter.directory
        if source.feedback and source.feedback.is_trained and made_in:
            trained = self.twin.weights.load_feedback(made_in)
        self.twin.feedback.attach(self.model, source.feedback, config.seed, trained)

    def _make_trainer(self, config: RunConfig, **options: Any) -> Any:
        """The trainer of the finished model."""
        return self.twin.train.Trainer(self.model, **options)

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        lr: float,
        dropout_key: tuple[int, ...],
        progress: float = 0.0,
    ) -> StepStats:
        """One optimizer update on the summed gradients, divided once by all targets.

        dropout_key: (..., number of the update in its epoch) names all that is random in it.
        progress: share of the run's updates that are done.
        micro_batches: this process's share, maybe none: its i-th is number rank + i * size of the
        update (see `World`). Gradients, losses and targets are summed over all processes.
        """
        self._table = None
        start, before = time.perf_counter(), self.n_traces()
        stats = self.trainer.step(micro_batches, lr, dropout_key, progress)
        if n := self.n_traces() - before:
            n_before, seconds = self._compiled
            self._compiled = (n_before + n, seconds + time.perf_counter() - start)
        return stats

    def compiled_in_words(self) -> str:
        """How many functions were compiled for updates since the last call; "" if none was."""
        (n, seconds), self._compiled = self._compiled, (0, 0.0)
        if not n:
            return ""
        return (
            f"compiled {n} functions in {seconds:.1f} s, their first run included; each new length"
            " of rows is compiled once"
        )

    def eval_loss(self, batch: Batch) -> LossSum:
        """Loss without dropout and without an update."""
        return self.trainer.loss(batch)

    def generate(
        self,
        batch: Batch,
        decoding: Decoding,
        replaced: np.ndarray | None = None,
        n_measured: int | None = None,
    ) -> list[list[int]]:
        """New tokens of every row of a batch of prompts; eos is kept where it was produced.

        replaced (R, B, D): what the latents receive instead of the model's own thoughts.
        n_measured: of so many rows, the first, the thoughts count in `thought_statistics`; None: of
        all.
        """
        decoding = replace(decoding, n_positions=self.n_positions)
        watch = None if self.statistics is None else partial(self._measure, n_measured)
        with self.trainer.compute_weights():
            return self.twin.generate.generate(
                self.model, batch, self._n_passes(batch), decoding, replaced, watch
            )

    def _n_passes(self, batch: Batch) -> int:
        return batch.n_passes * self.feeds_back

    def _measure(self, n_rows: int | None, state: Any) -> None:
        """Add the thoughts of the first rows of a `LatentOutput` to the statistics."""
        if state.thoughts and self.statistics is not None:
            self._table = self._table or Table.of(self.twin.arrays, self.model)
            add_to(self.statistics, self.twin.arrays, self.model, state, n_rows, self._table)

    @property
    def mixes_rows(self) -> bool:
        """Whether what a row thinks depends on its batch mates."""
        rule = getattr(self.model.feedback, "rule", None)
        return rule is not None and rule.find("shuffle") is not None

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this process holds all weights; every process enters and leaves."""
        return nullcontext()

    def thoughts(self, batch: Batch) -> np.ndarray:
        """What the latents of a batch of prompts receive: (R, B, D) float32."""
        with self.trainer.compute_weights():
            return self.twin.latent.thoughts_of(self.model, batch, self._n_passes(batch))

    def trace(self, batch: Batch) -> Trace:
        """States, thoughts, read-outs and attention at every latent of one prompt."""
        with self.trainer.compute_weights():
            return self.twin.look_inside.trace(self.model, batch, self._n_passes(batch))

    def continuation_logprobs(
        self, batch: Batch, continuations: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Nats of the token behind each prompt (B, V), and of each prompt's continuations."""
        with self.trainer.compute_weights():
            return self.twin.look_inside.continuation_logprobs(
                self.model, batch, self._n_passes(batch), continuations
            )

    def sample(
        self,
        prompts: Batch,
        decoding: Decoding,
        source: np.ndarray,
        streams: Sequence[tuple[int, ...]],
    ) -> list[Sampled]:
        """LaTRO: new tokens of R rows; row r goes on from prompt source[r], drawn by streams[r]."""
        decoding = replace(decoding, n_positions=self.n_positions)
        return self.policy.sample(prompts, decoding, source, streams)

    def keep_reference(self) -> None:
        """LaTRO: freeze the weights of now as the reference."""
        self.policy.keep_reference()

    def score(self, batch: RolloutBatch, of_reference: bool = False) -> Scores:
        """LaTRO: log-probability and entropy of every target, without an update."""
        return self.policy.score(batch, of_reference)

    def policy_step(self, micro_batches: Sequence[RolloutBatch], lr: float) -> PolicyStats:
        """LaTRO: one update on minus the weighted log-probabilities, summed over all batches."""
        self._table = None
        return self.policy.step(micro_batches, lr)

    def thought_statistics(self) -> dict[str, Any]:
        """What the thoughts of `generate` looked like since the last call; {} without any."""
        if self.statistics is None:
            return {}
        found, self.statistics = self.statistics.means(), ThoughtStatistics()
        return found

    def fit_feedback(self, batches: Iterable[Batch]) -> None:
        """Fit the rule's `linear` on batches of ordinary text."""
        with self.gathered():
            fitted = self.twin.feedback.fitted(self.model, batches)
        self.model.feedback.set_weights(fitted)

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        self.trainer.reset_optimizer()

    def restore(self, directory: Path) -> None:
        """Read the weights of a checkpoint of this run, in place of those of now."""
        self._table = None
        if self.adapter is not None:
            adapter = replace(self.adapter, directory=directory)
            self.twin.adapters.load(self.model, self.config, adapter)
        else:
            model, _, _ = self.twin.weights.load_model(directory)
            self.twin.weights.take_weights(self.model, model)
        if self.model.feedback is not None:
            trained = self.twin.weights.load_feedback(directory)
            self.model.feedback.set_trained(trained)
            self.model.feedback.version += 1

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside, the model is its frozen base: a reference policy without a second copy."""
        return self.twin.adapters.disabled(self.model)

    def save(self, directory: Path | None, with_optimizer: bool) -> None:
        """Write config.json, model.safetensors and, if asked, optimizer.safetensors.

        Of an adapted model its adapter instead of model.safetensors; see checkpoints/adapters.py.
        directory: None in all processes but the first, which only hand over what they hold alone.
        """
        if self.model.feedback is not None:
            self.model.feedback.inverses.forget()  # a resumed run makes them anew too
        weights = self.twin.weights
        with self.gathered():
            # First: whatever the disk then says to one process, no other is left waiting.
            if with_optimizer:
                weights.save_moments(self.trainer.optimizer, self.naming, directory)
            if directory is not None:
                save_config(self.config, self.model.args, directory)
                if self.adapter is None:
                    hf = weights.hf_weights(self.model, self.module)
                    save_weights(hf, directory, weights.write_tensors)
                else:
                    self.twin.adapters.save(self.model, self.config, self.adapter, directory)
                weights.save_feedback(self.model, directory)

    def save_fused(self, directory: Path) -> None:
        """Write a whole float checkpoint: adapters fused into the weights, nothing quantised."""
        config = {n: v for n, v in self.config.items() if not n.startswith("quantization")}
        save_config(config, self.model.args, directory)
        fused = self.module.to_hf(self.twin.adapters.fused(self.model))
        save_weights(fused, directory, self.twin.weights.write_tensors)
        self.twin.weights.save_feedback(self.model, directory)

    def load_optimizer(self, directory: Path) -> None:
        """Read the moments a checkpoint holds."""
        self.reset_optimizer()
        self.twin.weights.load_moments(self.trainer.optimizer, self.model, self.naming, directory)

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter under its Hugging Face name and layout, float32; adapters fused in."""
        with self.gathered():
            fused = self.module.to_hf(self.twin.adapters.fused(self.model))
            return self.twin.weights.to_numpy(fused)

    def memory(self) -> dict[str, int]:
        """Bytes: `peak_memory_bytes` since the last call; `active_`, held now, and `cached_`, kept
        for arrays to come, where the library counts them."""
        raise NotImplementedError

    def n_traces(self) -> int:
        """How often a step was traced or compiled."""
        return self.trainer.n_traces


def _n_numbers(arrays: Mapping[str, Any]) -> int:
    return sum(math.prod(w.shape) for w in arrays.values())


MakeBackend = Callable[[RunConfig, Source], Backend]
