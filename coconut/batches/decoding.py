"""How new tokens are drawn, and when a row of them ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coconut.batches.results import Sampled


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

    @property
    def last_position(self) -> int:
        """The highest position that a token may have."""
        return np.iinfo(np.int32).max if self.n_positions is None else self.n_positions - 1

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


class Outputs:
    """What rows have written, and which of them still write."""

    def __init__(self, decoding: Decoding, lengths: np.ndarray):
        """lengths (R,): positions that the prompt of each row takes."""
        self.decoding, self.room = decoding, decoding.room(lengths)
        self.sampled = [Sampled([], []) for _ in lengths]
        self.rows = np.arange(len(lengths))
        """Numbers of the rows that are in the batch."""
        self.ended = self.room < 1

    def add(self, tokens: np.ndarray, logprobs: np.ndarray | None = None) -> None:
        """The next tokens (N, rows) of the rows in the batch; those behind an end are dropped."""
        given = np.zeros(tokens.shape) if logprobs is None else logprobs
        for new, nats in zip(tokens, given, strict=True):
            for row, token, logprob in zip(self.rows, new, nats, strict=True):
                if not self.ended[row]:
                    out = self.sampled[row]
                    out.tokens.append(int(token))
                    out.logprobs.append(float(logprob))
                    is_full = len(out.tokens) == self.room[row]
                    self.ended[row] = self.decoding.ends(out.tokens) or is_full

    @property
    def are_complete(self) -> bool:
        """Whether every row has ended."""
        return bool(self.ended.all())

    def leave(self, share: float) -> np.ndarray | None:
        """Drop rows that ended, once fewer than this share write; which places of now are kept."""
        writing = ~self.ended[self.rows]
        if writing.mean() >= share:
            return None
        keep = np.flatnonzero(writing)
        self.rows = self.rows[keep]
        return keep
