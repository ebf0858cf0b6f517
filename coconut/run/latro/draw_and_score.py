"""Rationales drawn and scored: the work of an update that several processes share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coconut.backend import Backend
from coconut.batches.batch import chunks, collate
from coconut.batches.decoding import Decoding
from coconut.batches.latro_prompts import Data
from coconut.batches.rollouts import Rollout, RolloutBatch, collate_rollouts
from coconut.config.latro_keys import LatroConfig
from coconut.world import World


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of rollouts, nats: of what was said and of the answer (B,), and the
    reference's of what was said.

    tokens, ref_tokens: those of what was said, a token each; of no use to the published loss, so
    empty there. entropy: summed over the n_said tokens. n_answer: tokens of the answers.
    """

    said: np.ndarray
    answers: np.ndarray
    ref: np.ndarray
    tokens: list[list[float]]
    ref_tokens: list[list[float]]
    entropy: float
    n_said: int
    n_answer: int


class Rollouts:
    """Rollouts of a run's model, drawn and scored by all its processes.

    config: of all processes together.
    """

    def __init__(self, config: LatroConfig, backend: Backend, data: Data, world: World):
        self.config, self.backend, self.data, self.world = config, backend, data, world

    def sample(
        self, items: Sequence[dict[str, Any]], u: int
    ) -> tuple[list[Rollout], list[list[int]]]:
        """K rollouts of every item, groups adjacent; and the tokens that were drawn."""
        return self._drawn(items, u, self.config.rloo_k, self.config.temperature)

    def greedy(self, items: Sequence[dict[str, Any]]) -> tuple[list[Rollout], list[list[int]]]:
        """The likeliest rollout of every item, token by token; and its tokens."""
        return self._drawn(items, 0, 1, 0.0)

    def _drawn(
        self, items: Sequence[dict[str, Any]], u: int, K: int, temperature: float
    ) -> tuple[list[Rollout], list[list[int]]]:
        config, d = self.config, self.data
        prompts = [d.prompt(item) for item in items]
        # An answer of one's own goes on to the end, as in an evaluation.
        whole, cut = (lambda tokens: tokens[-1] in d.stop_ids), d.stops.ended
        stops = whole if config.writes_answers else cut
        decoding = Decoding(config.response_length, d.end_id, temperature, config.seed, stops)
        source = np.repeat(np.arange(len(items)), K)

        def draw(part: np.ndarray) -> list[list[int]]:
            used, of_row = np.unique(source[part], return_inverse=True)
            batch = collate([prompts[i] for i in used], d.tokenizer.pad_id)
            streams = [(u, int(row)) for row in part]
            return [row.tokens for row in self.backend.sample(batch, decoding, of_row, streams)]

        parts = list(chunks(np.arange(len(source)), config.rollout_batch_size))
        drawn = [tokens for part in self.world.deal(parts, draw) for tokens in part]
        rollouts = [
            d.rollout(prompts[i], tokens, items[i])
            for i, tokens in zip(source.tolist(), drawn, strict=True)
        ]
        if config.writes_answers:
            rollouts = [d.with_answer(*pair) for pair in zip(rollouts, drawn, strict=True)]
        return rollouts, drawn

    def score(self, rollouts: Sequence[Rollout]) -> Scored:
        """Log-probabilities of rollouts by the policy and its reference."""
        by_token = self.config.has_surrogate

        def scored(part: np.ndarray) -> list[Any]:
            batch = self.collate([rollouts[i] for i in part])
            scores = self.backend.score(batch)
            z, y = batch.sums(scores.logprobs)
            ref, ref_logprobs = z, scores.logprobs
            if self.config.kl_coef:
                ref_logprobs = self.backend.score(batch, of_reference=True).logprobs
                ref = batch.sums(ref_logprobs)[0]
            entropies = float(batch.sums(scores.entropies)[0].sum())
            n_answer = int(batch.target_is_answer[: batch.n_real].sum())
            tokens = [batch.said(x) if by_token else [] for x in (scores.logprobs, ref_logprobs)]
            counts = (entropies, batch.n_real - n_answer, n_answer)
            return [z.tolist(), y.tolist(), ref.tolist(), *tokens, *counts]

        parts = list(chunks(np.arange(len(rollouts)), self.config.rollout_batch_size))
        *listed, entropies, n_said, n_answer = zip(*self.world.deal(parts, scored), strict=True)
        said, answers, ref = (np.concatenate(x) for x in listed[:3])
        tokens, ref_tokens = ([row for part in x for row in part] for x in listed[3:])
        counts = (sum(entropies), sum(n_said), sum(n_answer))
        return Scored(said, answers, ref, tokens, ref_tokens, *counts)

    def collate(self, rollouts: Sequence[Rollout], **weights: Any) -> RolloutBatch:
        """Rollouts as a batch; weights: those of the loss, for `collate_rollouts`."""
        config = self.config
        return collate_rollouts(
            rollouts,
            self.data.tokenizer.pad_id,
            config.pad_multiple,
            config.reward_offset,
            config.temperature,
            **weights,
        )
