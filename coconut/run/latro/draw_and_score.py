"""Rationales drawn and scored: the work of an update that several processes share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coconut.backend import Backend, Decoding
from coconut.batches.batch import chunks, collate
from coconut.batches.latro_prompts import Data
from coconut.batches.rollouts import Rollout, RolloutBatch, collate_rollouts
from coconut.config.latro_keys import LatroConfig
from coconut.world import World


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
        config, d = self.config, self.data
        prompts = [d.prompt(item) for item in items]
        decoding = Decoding(
            config.response_length,
            d.end_id,
            config.temperature,
            config.seed,
            d.stops.ended,
        )
        source = np.repeat(np.arange(len(items)), config.rloo_k)

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
        return rollouts, drawn

    def score(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, int, int]:
        """(policy's and answer's log-probabilities, the reference's, summed entropy, tokens said,
        tokens of answers)."""

        def scored(part: np.ndarray) -> list[Any]:
            batch = self.collate([rollouts[i] for i in part])
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

    def collate(self, rollouts: Sequence[Rollout], **weights: Any) -> RolloutBatch:
        config = self.config
        return collate_rollouts(
            rollouts,
            self.data.tokenizer.pad_id,
            config.pad_multiple,
            config.reward_offset,
            config.temperature,
            **weights,
        )
