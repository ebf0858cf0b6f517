"""How the blocks of a model run, and who looks on, whatever arrays they compute with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from coconut.errors import UserError

Array = Any
"""Of the twin that computes."""
Tap = Callable[[int, Array], None]
"""Is shown h^0, which the first block reads, to h^L, before the final norm: (B, T, D) each."""
NEVER = -1e9
"""Added to the score of a key that must not be seen; finite, so that no row can become NaN."""
RECORD: ContextVar[list[Array] | None] = ContextVar("attention record", default=None)
"""Where attention adds its weights, if anybody asks for them: see `recorded_attention`."""

SAME = 1e-3
"""Of the largest logit: how far a borrowed model's parts may be from its whole. Seen: 1e-6."""


class Draw:
    """The dropout key of the block being computed; None leaves all adapters' inputs whole."""

    key: Any = None


def run_blocks(
    blocks: Iterable[Callable[..., Array]],
    x: Array,
    mask: Any,
    cache: Any,
    keys: Sequence[Any],
    *shared: Any,
    tap: Tap | None = None,
) -> Array:
    """States (B, T, D) behind all blocks, before the final norm.

    keys: one a block. shared: what all blocks are given beside. tap: is shown the states between.
    """
    if tap:
        tap(0, x)
    for layer, (block, key) in enumerate(zip(blocks, keys, strict=True)):
        x = block(x, mask, cache, layer, key, *shared)
        if tap:
            tap(layer + 1, x)
    return x


@contextmanager
def recorded_attention() -> Iterator[list[Array]]:
    """Inside the block, every `attend` adds its weights to the list, in order of the calls."""
    record: list[Array] = []
    token = RECORD.set(record)
    try:
        yield record
    finally:
        RECORD.reset(token)


# ---- a model that is borrowed from another library, built as Llama is


class BorrowedVerbs:
    """The verbs of a borrowed model that need no array functions of its twin."""

    library: str
    """Whose it is, as messages say."""
    model_type: str
    scale = 1.0
    """What the model multiplies its embeddings by."""
    has_window = False
    """Whether some layers see only the nearest positions."""
    shares_prompts = False
    """Its own code reads keys as one array of all rows; see `DecodeCache`."""
    draw: Draw | None = None
    """Where adapters with dropout find the key of the block; see adapters.py."""
    model: Any
    layers: Any

    def embed(self, ids: Array) -> Array:
        """What the first block reads, which thoughts replace: ids (B, T) -> (B, T, D)."""
        x = self.embed_tokens(ids)
        return x if self.scale == 1 else x * self.scale

    def position_embedding(self, positions: Array) -> Array | None:
        """What `trunk` adds to the inputs at these positions: nothing."""
        return None

    @property
    def embed_tokens(self) -> Any:
        """The table of input embeddings."""
        return self.model.embed_tokens

    @property
    def embedding(self) -> Array:
        """Input embeddings (V, D), as the first block reads them."""
        w = self.embed_tokens.weight
        return w if self.scale == 1 else w * self.scale

    @property
    def norm_kind(self) -> str:
        """Whether the final norm takes the mean away: `layer` or `rms`."""
        return "layer" if "LayerNorm" in type(self.model.norm).__name__ else "rms"

    def seen(self, positions: Array, cache: Any) -> list[Array] | None:
        """Positions (B, 1, S_i, 1) of all columns so far, kept behind the layers' keys.

        None where positions (B, T) are all that a window is measured by.
        """
        if not self.has_window or cache is None:
            return None
        n = len(self.layers)
        for kept in (cache.keys, cache.values):
            if len(kept) == n:
                kept.append([])
        column = positions[:, None, :, None]
        return cache.update(n, column, column)[0]

    def both_ways(self) -> tuple[np.ndarray, np.ndarray]:
        """Last logits of two rows: by the parts, in two passes, one row padded; by the whole."""
        raise NotImplementedError

    def check(self, where: str) -> None:
        """Raise UserError unless the parts compute what the whole does, with these weights."""
        try:
            ours, theirs = self.both_ways()
        # Whatever the library does with what it did not expect.
        except Exception as error:
            raise UserError(
                where,
                f"model_type {self.model_type!r} cannot run in latent passes: {first_line(error)}",
            ) from None
        gap, largest = (float(np.abs(a).max()) for a in (ours - theirs, theirs))
        if not gap <= SAME * largest:  # NaN too
            raise UserError(
                where,
                f"model_type {self.model_type!r}: padded and in passes it computes other logits"
                f" than {self.library} does (by {gap:.2g} of {largest:.2g}); not supported",
            )


def first_line(error: Exception) -> str:
    """What a library complains of, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
