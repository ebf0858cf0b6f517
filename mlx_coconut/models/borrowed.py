"""Any other architecture: mlx_lm's own model, in the verbs that latent passes need.

mlx_lm's forward runs in parts, with stand-ins for a part of it during the call:

    embed_tokens   scale      blocks     norm         head
    |--- embed ------|-- trunk ------------|--- head ---|
                              final_norm: blocks left out

A thought enters where the first block reads, behind whatever the model multiplies its embeddings
by (Gemma: by sqrt(D)). The stream there is what the blocks were trained on, and a state after the
final norm has a scale of its own, not that of a row of the table; the published code does the same
with models whose embedding layer multiplies.

What is ours: positions a token (batches are padded on the left), masks, caches that gradients flow
through. `check` holds the parts against mlx_lm's forward, once the weights are there.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from coconut.blocks import RECORD, BorrowedVerbs, Tap
from coconut.errors import UserError
from mlx_coconut.models.base import (
    Key,
    Mask,
    additive_mask,
    attend,
    checkpointed,
    split_key,
)
from mlx_coconut.models.cache import Cache, SegmentCache
from mlx_coconut.models.stand_ins import Behind, Block, LayerCache, Slot, joined

_GROUPED = ("gemma2",)
"""Whose attention gives the groups of heads an axis of their own, which the mask needs too."""


class Borrowed(BorrowedVerbs):
    """The verbs, mixed into a model class of the library's: its parameters keep their names."""

    library = "mlx_lm"

    def trunk(
        self,
        x: mx.array,
        positions: mx.array,
        mask: Mask = None,
        cache: Cache | None = None,
        key: Key = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> mx.array:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns the dropout of adapters on. mask: see `additive_mask`. checkpointing: recompute
        each block in the backward pass. tap: is shown the states between.
        """
        keys = split_key(key, len(self.layers))
        seen = self.seen(positions, cache)
        seen = None if seen is None else joined(seen)[:, 0, :, 0]

        def run(layer: int, block, h: mx.array, block_mask: mx.array | None) -> mx.array:
            if layer == 0:
                h = x
                if tap:
                    tap(0, h)
            block = Block(block, self.draw)
            call = checkpointed(block) if checkpointing else block
            store = SegmentCache(len(self.layers)) if cache is None else cache
            h = call(h, block_mask, store, layer, keys[layer], positions)
            if tap:
                tap(layer + 1, h)
            return h

        grouped = self.model_type in _GROUPED and self._has_groups()
        sight = LayerCache(None, 0, positions, seen, mask, grouped)
        with _shown_attention(self):
            return self.run_inner(run, sight, x.shape[:2])

    def head(self, h: mx.array) -> mx.array:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        inner = self.model
        # Into the dictionary itself: setting an attribute would move it behind the others.
        self["model"] = Behind(inner, h)
        try:
            return self(mx.zeros((1, 1), mx.int32))
        finally:
            self["model"] = inner

    def final_norm(self, h: mx.array) -> mx.array:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        empty = LayerCache(None, 0, mx.zeros((1, 1), mx.int32))
        return self.run_inner(lambda layer, block, _, mask: h, empty, (1, 1))

    @property
    def unembedding(self) -> mx.array:
        """Weights of the head (V, D)."""
        return self.lm_head.weight if "lm_head" in self else self.model.embed_tokens.weight

    def both_ways(self) -> tuple[np.ndarray, np.ndarray]:
        """Last logits of two rows: by the parts, in two passes, one row padded; by the whole."""
        ids = mx.array([[3, 1, 4, 1, 5, 2], [0, 0, 2, 7, 1, 6]]) % self.embed_tokens.weight.shape[0]
        positions = mx.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
        keys = mx.array([[True] * 6, [False] * 2 + [True] * 4])
        x, cache = self.embed(ids), SegmentCache(len(self.layers))
        for start, end in ((0, 4), (4, 6)):
            mask = additive_mask(keys, start, end, x.dtype)
            h = self.trunk(x[:, start:end], positions[:, start:end], mask, cache)
        theirs = mx.concatenate([self(ids[:1])[:, -1], self(ids[1:, 2:])[:, -1]])
        return np.array(self.head(h[:, -1])), np.array(theirs)

    def _has_groups(self) -> bool:
        return self.args.num_key_value_heads < self.args.num_attention_heads

    def run_inner(self, run: Callable, cache: LayerCache, shape: tuple[int, ...]) -> mx.array:
        with self.stand_ins(run):
            # The tokens are read for their shape only: `run` gives the first block its inputs.
            return self.model(mx.zeros(shape, mx.int32), cache=[cache] * len(self.layers))

    @contextmanager
    def stand_ins(self, run: Callable) -> Iterator[None]:
        blocks = self.model.layers
        self.model["layers"] = [Slot(block, i, run) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            self.model["layers"] = blocks


@contextmanager
def _shown_attention(model) -> Iterator[None]:
    """Where attention weights are asked for, let the model use our attention inside."""
    if RECORD.get() is None:
        yield
        return
    module, name = sys.modules[type(model.layers[0]).__module__], "scaled_dot_product_attention"
    own = getattr(module, name, None)
    if own is None:
        raise UserError(
            f"model_type {model.model_type!r}",
            "its attention cannot be looked into: its own code computes it, not a shared function",
        )

    def shown(q, k, v, cache, scale, mask, sinks=None):
        return attend(q * (scale * q.shape[-1] ** 0.5), [k], [v], mask)

    setattr(module, name, shown)
    try:
        yield
    finally:
        setattr(module, name, own)
