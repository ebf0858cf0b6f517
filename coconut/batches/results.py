"""What a back end makes of batches: numbers on the host."""

from dataclasses import dataclass

import numpy as np


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
