"""How new tokens are drawn, and when a row of them ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Decoding:
    """How new tokens are drawn. temperature 0 is greedy.

    stops: further ends of a row besides eos; told the row's tokens after each new one.
    n_positions: of the model, which the back end fills in; None: it has no limit.
    """

    max_new_tokens: int
    eos_id: int
    temperature: float = 0.0
    seed: int = 0
    stops: Callable[[list[int]], bool] | None = None
    n_positions: int | None = None

    def room(self, lengths: np.ndarray) -> np.ndarray:
        """New tokens (R,) that each row may have behind a prompt of so many positions (R,)."""
        limit = math.inf if self.n_positions is None else self.n_positions
        return np.minimum(self.max_new_tokens, limit - lengths)

    def ran_out(self, tokens: list[int]) -> bool:
        """Whether a row's new tokens stop because the model has no further position for it."""
        return len(tokens) < self.max_new_tokens and not self.ends(tokens)

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
