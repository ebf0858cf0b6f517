"""How the blocks of a model run, and who looks on, whatever arrays they compute with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Array = Any
"""Of the twin that computes."""
Tap = Callable[[int, Array], None]
"""Is shown h^0, which the first block reads, to h^L, before the final norm: (B, T, D) each."""
NEVER = -1e9
"""Added to the score of a key that must not be seen; finite, so that no row can become NaN."""
RECORD: ContextVar[list[Array] | None] = ContextVar("attention record", default=None)
"""Where attention adds its weights, if anybody asks for them: see `recorded_attention`."""


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
