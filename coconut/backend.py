"""The protocol both twins answer, at the grain of one optimizer update.

The loops in this package decide when something happens; a back end decides how. Nothing but numpy
arrays, numbers, strings and paths crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coconut.batches.batch import Batch
from coconut.batches.rollouts import RolloutBatch

if TYPE_CHECKING:
    from coconut.config.keys import RunConfig
from coconut.checkpoints.source import Source


@dataclass(frozen=True)
class StepStats:
    """One update: summed loss in nats over n_targets labels, gradient norm before clipping."""

    loss_sum: float
    n_targets: int
    grad_norm: float
    n_tokens: int = 0
    """Real tokens of all micro-batches, of every process."""

    @property
    def loss(self) -> float:
        """Mean loss a label, nats."""
        return self.loss_sum / max(self.n_targets, 1)


@dataclass(frozen=True)
class LossSum:
    """Summed loss in nats and the labels it is summed over; sums add up, means do not."""

    loss_sum: float
    n_targets: int


@dataclass(frozen=True)
class Decoding:
    """How new tokens are drawn. temperature 0 is greedy.

    stops: further ends of a row besides eos; told the row's tokens after each new one.
    """

    max_new_tokens: int
    eos_id: int
    temperature: float = 0.0
    seed: int = 0
    stops: Callable[[list[int]], bool] | None = None

    def ends(self, tokens: list[int]) -> bool:
        """Whether a row is complete with these new tokens."""
        if not tokens:
            return False
        return tokens[-1] == self.eos_id or (self.stops is not None and self.stops(tokens))

    def uniforms(self, streams: Sequence[tuple[int, ...]]) -> np.ndarray:
        """(R, max_new_tokens) float32 in [0, 1): what each token of each row is drawn by."""
        if self.temperature == 0:
            return np.zeros((len(streams), self.max_new_tokens), np.float32)
        rngs = (np.random.default_rng([self.seed, *stream]) for stream in streams)
        return np.stack([rng.random(self.max_new_tokens, dtype=np.float32) for rng in rngs])


@dataclass(frozen=True)
class Sampled:
    """New tokens of a row, the one that ended it included, and the log-probability of each.

    Those of the distribution drawn from, temperature included; 0 if decoded greedily.
    """

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Trace:
    """What happens at the n latents of one prompt; float32.

    states (n, D): after the final norm, in the column before each latent. thoughts (n, D): what the
    latents receive. logprobs (n, V): the states through the output head, nats. attention
    (n, L, H, T): from each latent to every column of the prompt, by layer and head; sums to 1.
    embedding_norms (V,): of the token embeddings that thoughts stand in for.
    """

    states: np.ndarray
    thoughts: np.ndarray
    logprobs: np.ndarray
    attention: np.ndarray
    embedding_norms: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Of every target of a batch of rollouts: its log-probability and the entropy there, nats."""

    logprobs: np.ndarray
    entropies: np.ndarray


@dataclass(frozen=True)
class PolicyStats:
    """One policy update: gradient norm before clipping, and for each micro-batch the targets'
    log-probabilities that the gradient was taken at."""

    grad_norm: float
    logprobs: list[np.ndarray]


class Backend(Protocol):
    """A model on a device, its optimizer, and what the loop asks of them."""

    name: str
    """mlx_coconut or cuda_coconut."""
    device: str
    dtype: str
    note: str
    """A line for the log about the libraries underneath; may be empty."""
    model_type: str
    n_params: int
    n_trained: int
    """How many of n_params, or of an adapter beside them, an update changes."""
    n_positions: int | None

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
        ...

    def eval_loss(self, batch: Batch) -> LossSum:
        """Loss without dropout and without an update."""
        ...

    def generate(
        self, batch: Batch, decoding: Decoding, replaced: np.ndarray | None = None
    ) -> list[list[int]]:
        """New tokens of every row of a batch of prompts; eos is kept where it was produced.

        replaced (R, B, D): what the latents receive instead of the model's own thoughts.
        """
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this process holds all weights; every process enters and leaves."""
        ...

    def thoughts(self, batch: Batch) -> np.ndarray:
        """What the latents of a batch of prompts receive: (R, B, D) float32."""
        ...

    def trace(self, batch: Batch) -> Trace:
        """States, thoughts, read-outs and attention at every latent of one prompt."""
        ...

    def continuation_logprobs(
        self, batch: Batch, continuations: Sequence[Sequence[Sequence[int]]]
    ) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """Nats of the token behind each prompt (B, V), and of each prompt's continuations."""
        ...

    def sample(
        self,
        prompts: Batch,
        decoding: Decoding,
        source: np.ndarray,
        streams: Sequence[tuple[int, ...]],
    ) -> list[Sampled]:
        """LaTRO: new tokens of R rows; row r goes on from prompt source[r], drawn by streams[r]."""
        ...

    def keep_reference(self) -> None:
        """LaTRO: freeze the weights of now as the reference."""
        ...

    def score(self, batch: RolloutBatch, of_reference: bool = False) -> Scores:
        """LaTRO: log-probability and entropy of every target, without an update."""
        ...

    def policy_step(self, micro_batches: Sequence[RolloutBatch], lr: float) -> PolicyStats:
        """LaTRO: one update on minus the weighted log-probabilities, summed over all batches."""
        ...

    def thought_statistics(self) -> dict[str, Any]:
        """What the thoughts of `generate` looked like since the last call; {} without any."""
        ...

    def fit_feedback(self, batches: Iterable[Batch]) -> None:
        """Fit the rule's `linear` on batches of ordinary text."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        ...

    def restore(self, directory: Path) -> None:
        """Read the weights of a checkpoint of this run, in place of those of now."""
        ...

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside, the model is its frozen base: a reference policy without a second copy."""
        ...

    def save(self, directory: Path | None, with_optimizer: bool) -> None:
        """Write config.json, model.safetensors and, if asked, optimizer.safetensors.

        Of an adapted model its adapter instead of model.safetensors; see checkpoints/adapters.py.
        directory: None in all processes but the first, which only hand over what they hold alone.
        """
        ...

    def save_fused(self, directory: Path) -> None:
        """Write a whole float checkpoint: adapters fused into the weights, nothing quantised."""
        ...

    def load_optimizer(self, directory: Path) -> None:
        """Read the moments a checkpoint holds."""
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter under its Hugging Face name and layout, float32; adapters fused in."""
        ...

    def memory(self) -> int:
        """Peak bytes since the last call."""
        ...

    def n_traces(self) -> int:
        """How often a step was traced or compiled."""
        ...


MakeBackend = Callable[["RunConfig", Source], Backend]
