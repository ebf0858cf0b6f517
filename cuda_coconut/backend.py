"""The back end protocol in torch, by calling the files beside this one."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coconut.backend import Decoding, LossSum, PolicyStats, Sampled, Scores, StepStats, Trace
from coconut.batches.batch import Batch
from coconut.batches.rollouts import RolloutBatch
from coconut.checkpoints.initial import grown_rows, initial_weights
from coconut.checkpoints.source import Source
from coconut.config.keys import WITH_FEEDBACK, RunConfig
from coconut.feedback.statistics import ThoughtStatistics
from coconut.world import World
from cuda_coconut import models
from cuda_coconut.models import adapters, weights
from cuda_coconut.models.base import RULE_PREFIX
from cuda_coconut.models.cpu import keep_freed_memory
from cuda_coconut.thoughts.feedback import attach, fit, set_trained, set_weights
from cuda_coconut.thoughts.generate import generate
from cuda_coconut.thoughts.latent import LatentOutput, thoughts_of
from cuda_coconut.thoughts.look_inside import continuation_logprobs, trace
from cuda_coconut.thoughts.measures import measure
from cuda_coconut.updates.latro import Policy
from cuda_coconut.updates.train import Trainer


class Backend:
    """A model in torch with its optimizer. See coconut/backend.py for the protocol."""

    name = "cuda_coconut"

    def __init__(self, config: RunConfig, source: Source, world: World | None = None):
        self.config = dict(source.config)
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.dtype = "bfloat16" if config.bf16 else "float32"
        self.note = f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
        if torch.version.cuda and not self.on_gpu:
            self.note += ": this torch is built for a GPU and sees none"
        self.feeds_back = config.method in WITH_FEEDBACK
        if source.feedback and source.feedback.rule.is_token:
            self.feeds_back = False  # every latent keeps its embedding: one pass suffices
        if source.directory is None:
            self.config["vocab_size"] = source.vocab_size
            self.model, self.module = models.build(self.config, "model_config_path")
            shapes = {
                n: tuple(w.shape) for n, w in weights.hf_weights(self.model, self.module).items()
            }
            drawn = initial_weights(shapes, self.config, config.seed)
            own = self.module.sanitize({n: torch.from_numpy(w) for n, w in drawn.items()})
            weights.set_weights(self.model, own, "random weights")
        else:
            self.model, self.module, _ = weights.load_model(source.directory)
            if source.vocab_size > self.config["vocab_size"] or source.new_tokens:
                begun = config if source.adapter is None else source.adapter
                self._grow(source, begun.seed)
        self.n_params = sum(w.numel() for w in self.model.parameters())
        self.adapter = source.adapter
        self.naming = self.module
        if source.adapter is not None:
            self.naming = adapters
            adapters.adapt(self.model, self.config, source.adapter)
            if source.adapter.directory is not None:
                adapters.load(self.model, self.config, source.adapter)
        if self.feeds_back:
            trained = None
            made_in = source.directory
            if source.adapter is not None and source.adapter.directory is not None:
                made_in = source.adapter.directory
            if source.feedback and source.feedback.is_trained and made_in:
                trained = weights.load_feedback(made_in)
            attach(self.model, source.feedback, config.seed, trained)
        self.n_params += sum(w.numel() for w in weights.feedback_weights(self.model).values())
        self.n_trained = sum(w.numel() for w in self.model.parameters() if w.requires_grad)
        self.model.to("cuda" if self.on_gpu else "cpu")
        if not self.on_gpu:
            keep_freed_memory()
        self.trainer = Trainer(
            self.model,
            weight_decay=config.weight_decay,
            beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            feeds_back=self.feeds_back,
            checkpointing=config.gradient_checkpointing,
            feedback_rate=config.feedback_lr_multiplier,
            world=world,
            shard=config.shard,
        )
        self.policy = Policy(self.trainer)
        self.statistics = ThoughtStatistics()
        self.model_type = self.config["model_type"]
        self.n_positions = source.n_positions

    def _grow(self, source: Source, seed: int) -> None:
        """Rebuild the model around a larger embedding: resized first, then rows written."""
        hf = weights.to_numpy(weights.hf_weights(self.model, self.module))
        for name in self.module.VOCABULARY_ROWS:
            if name in hf:
                n = max(source.vocab_size, len(hf[name]))
                hf[name] = grown_rows(hf[name], n, source.copy_from, source.new_tokens, seed)
                self.config["vocab_size"] = n
        self.model, self.module = models.build(self.config, "config.json")
        own = self.module.sanitize({name: torch.from_numpy(w) for name, w in hf.items()})
        weights.set_weights(self.model, own, "grown embedding")

    def train_step(
        self,
        micro_batches: Sequence[Batch],
        lr: float,
        dropout_key: tuple[int, ...],
        progress: float = 0.0,
    ) -> StepStats:
        """One optimizer update on the summed gradients, divided once by all targets."""
        return self.trainer.step(micro_batches, lr, dropout_key, progress)

    def eval_loss(self, batch: Batch) -> LossSum:
        """Loss without dropout and without an update."""
        return self.trainer.loss(batch)

    def generate(
        self, batch: Batch, decoding: Decoding, replaced: np.ndarray | None = None
    ) -> list[list[int]]:
        """New tokens of every row of a batch of prompts; eos is kept where it was produced."""
        with self.trainer.compute_weights():
            n_passes = batch.n_passes * self.feeds_back
            return generate(self.model, batch, n_passes, decoding, replaced, self._measure)

    def _measure(self, state: LatentOutput) -> None:
        if state.thoughts:
            has = (state.inputs.is_latent & state.inputs.mask).cpu().numpy()
            # Latents stand in one run of columns, the same for all rows.
            first = int(np.argmax(has.any(axis=0)))
            has = has[:, first : first + len(state.thoughts)]
            sources = state.hidden[:, first - 1 : first - 1 + len(state.thoughts)]
            self.statistics.add(measure(self.model, state.thoughts, sources), has)
            thoughts = torch.stack(state.thoughts).float().cpu().numpy()
            self.statistics.add_rank(thoughts, has)

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this process holds all weights; every process enters and leaves."""
        return nullcontext() if self.trainer.shards is None else self.trainer.shards.gathered()

    def thoughts(self, batch: Batch) -> np.ndarray:
        """What the latents of a batch of prompts receive: (R, B, D) float32."""
        with self.trainer.compute_weights():
            return thoughts_of(self.model, batch, batch.n_passes * self.feeds_back)

    def trace(self, batch: Batch) -> Trace:
        """States, thoughts, read-outs and attention at every latent of one prompt."""
        with self.trainer.compute_weights():
            return trace(self.model, batch, batch.n_passes * self.feeds_back)

    def continuation_logprobs(
        self, batch: Batch, continuations: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Nats of the token behind each prompt (B, V), and of each prompt's continuations."""
        with self.trainer.compute_weights():
            n_passes = batch.n_passes * self.feeds_back
            return continuation_logprobs(self.model, batch, n_passes, continuations)

    def sample(
        self,
        prompts: Batch,
        decoding: Decoding,
        source: np.ndarray,
        streams: Sequence[tuple[int, ...]],
    ) -> list[Sampled]:
        """LaTRO: new tokens of R rows; row r goes on from prompt source[r], drawn by streams[r]."""
        return self.policy.sample(prompts, decoding, source, streams)

    def keep_reference(self) -> None:
        """LaTRO: freeze the weights of now as the reference."""
        self.policy.keep_reference()

    def score(self, batch: RolloutBatch, of_reference: bool = False) -> Scores:
        """LaTRO: log-probability and entropy of every target, without an update."""
        return self.policy.score(batch, of_reference)

    def policy_step(self, micro_batches: Sequence[RolloutBatch], lr: float) -> PolicyStats:
        """LaTRO: one update on minus the weighted log-probabilities, summed over all batches."""
        return self.policy.step(micro_batches, lr)

    def thought_statistics(self) -> dict[str, Any]:
        """What the thoughts of `generate` looked like since the last call; {} without any."""
        found, self.statistics = self.statistics.means(), ThoughtStatistics()
        return found

    def fit_feedback(self, batches: Iterable[Batch]) -> None:
        """Fit the rule's `linear` on batches of ordinary text."""
        with self.gathered():
            fit(self.model, batches)
            fitted = {n: w.clone() for n, w in weights.feedback_weights(self.model).items()}
        set_weights(self.model.feedback, fitted)

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        self.trainer.reset_optimizer()

    def restore(self, directory: Path) -> None:
        """Read the weights of a checkpoint of this run, in place of those of now."""
        if self.adapter is not None:
            adapter = replace(self.adapter, directory=directory)
            adapters.load(self.model, self.config, adapter)
        else:
            model, _, _ = weights.load_model(directory)
            rule = {n: w for n, w in self.model.state_dict().items() if n.startswith(RULE_PREFIX)}
            self.model.load_state_dict(model.state_dict() | rule)
        if self.model.feedback is not None:
            set_trained(self.model.feedback, weights.load_feedback(directory))
            self.model.feedback.version += 1

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside, the model is its frozen base: a reference policy without a second copy."""
        return adapters.disabled(self.model)

    def save(self, directory: Path | None, with_optimizer: bool) -> None:
        """Write config.json, model.safetensors and, if asked, optimizer.safetensors.

        Of an adapted model its adapter instead of model.safetensors; see checkpoints/adapters.py.
        """
        with self.gathered():
            # First: whatever the disk then says to one process, no other is left waiting.
            if with_optimizer:
                weights.save_moments(self.trainer.optimizer, self.naming, directory)
            if directory is not None:
                self._save_model(directory)
        if self.model.feedback is not None:
            self.model.feedback.inverses.forget()  # a resumed run makes them anew too

    def _save_model(self, directory: Path) -> None:
        weights.save_config(self.config, self.model.args, directory)
        if self.adapter is None:
            weights.save_weights(weights.hf_weights(self.model, self.module), directory)
        else:
            adapters.save(self.model, self.config, self.adapter, directory)
        weights.save_feedback(self.model, directory)

    def save_fused(self, directory: Path) -> None:
        """Write a whole float checkpoint: adapters fused into the weights, nothing quantised."""
        config = {n: v for n, v in self.config.items() if not n.startswith("quantization")}
        weights.save_config(config, self.model.args, directory)
        weights.save_weights(self.module.to_hf(adapters.fused(self.model)), directory)
        weights.save_feedback(self.model, directory)

    def load_optimizer(self, directory: Path) -> None:
        """Read the moments a checkpoint holds."""
        self.reset_optimizer()
        weights.load_moments(self.trainer.optimizer, self.model, self.naming, directory)

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter under its Hugging Face name and layout, float32; adapters fused in."""
        with self.gathered():
            return weights.to_numpy(self.module.to_hf(adapters.fused(self.model)))

    def memory(self) -> int:
        """Peak bytes of torch's arrays since the last call.

        On a CPU, of the whole process so far: torch counts no allocations there.
        """
        if not self.on_gpu:
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def n_traces(self) -> int:
        """How often a step was traced."""
        # twin: nothing is compiled here.
        return 0
