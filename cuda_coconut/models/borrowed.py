"""Any other architecture: transformers' own model, in the verbs that latent passes need.

transformers' forward runs in parts, with stand-ins for a part of it during the call:

    embed_tokens   scale      blocks     norm         head
    |--- embed ------|-- trunk ------------|--- head ---|
                              final_norm: blocks left out

A thought enters where the first block reads, behind whatever the model multiplies its embeddings
by (Gemma: by sqrt(D)). The stream there is what the blocks were trained on, and a state after the
final norm has a scale of its own, not that of a row of the table; the published code does the same
with models whose embedding layer multiplies.

What is ours: positions a token (batches are padded on the left), masks, caches that gradients flow
through. `check` holds the parts against transformers' forward, once the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from coconut.blocks import Tap
from coconut.errors import UserError
from cuda_coconut.models.base import Key, Mask, additive_mask, checkpointed, split_key
from cuda_coconut.models.cache import Cache, SegmentCache
from cuda_coconut.models.stand_ins import ATTENTION, Behind, Block, Sight, Slot, TiedHead

SAME = 1e-3
"""Of the largest logit: how far `check` lets the parts be from the whole. Seen: 1e-6."""


class Borrowed:
    """The verbs, mixed into a model class of the library's: its parameters keep their names."""

    scale = 1.0
    """What the model multiplies its embeddings by."""
    shares_prompts = False
    """Its own code reads keys as one array of all rows; see `DecodeCache`."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block reads, which thoughts replace: ids (B, T) -> (B, T, D)."""
        x = self.embed_tokens(ids)
        return x if self.scale == 1 else x * self.scale

    def trunk(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        mask: Mask = None,
        cache: Cache | None = None,
        key: Key = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns the dropout of adapters on. mask: see `additive_mask`. checkpointing: recompute
        each block in the backward pass. tap: is shown the states between.
        """
        keys = split_key(key, len(self.layers))
        sight = Sight(mask, positions, self._seen(positions, cache))
        store = SegmentCache(len(self.layers)) if cache is None else cache

        def run(slot: Slot, h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            if slot.layer == 0:
                h = x
                if tap:
                    tap(0, h)
            block = Block(slot, self.draw)
            call = checkpointed(block) if checkpointing else block
            h = call(h, sight, store, slot.layer, keys[slot.layer], options)
            if tap:
                tap(slot.layer + 1, h)
            return h

        return self.run_inner(run, x, positions)

    draw = None
    """Where adapters with dropout find the key of the block; see adapters.py."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        # Found before the module of that name: transformers' own code runs behind it.
        self.__dict__["model"] = Behind(self.model, h.reshape(1, -1, h.shape[-1]))
        try:
            logits = self(inputs_embeds=h).logits
        finally:
            del self.__dict__["model"]
        return logits.view(*h.shape[:-1], -1)

    def final_norm(self, h: torch.Tensor) -> torch.Tensor:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        x = h.reshape(1, -1, h.shape[-1])
        zero = torch.zeros(x.shape[:2], dtype=torch.long, device=h.device)
        return self.run_inner(lambda slot, *_: x, x, zero).view(h.shape)

    def position_embedding(self, positions: torch.Tensor) -> torch.Tensor | None:
        """What `trunk` adds to the inputs at these positions: nothing."""
        return None

    @property
    def args(self):
        """The fields of config.json."""
        return self.config

    @property
    def layers(self):
        """The blocks."""
        return self.model.layers

    @property
    def embed_tokens(self):
        """The table of input embeddings."""
        return self.model.embed_tokens

    @property
    def embedding(self) -> torch.Tensor:
        """Input embeddings (V, D), as the first block reads them."""
        w = self.embed_tokens.weight
        return w if self.scale == 1 else w * self.scale

    @property
    def unembedding(self) -> torch.Tensor:
        """Weights of the head (V, D)."""
        is_tied = isinstance(self.lm_head, TiedHead)
        return self.embed_tokens.weight if is_tied else self.lm_head.weight

    @property
    def norm_kind(self) -> str:
        """Whether the final norm takes the mean away: `layer` or `rms`."""
        return "layer" if "LayerNorm" in type(self.model.norm).__name__ else "rms"

    @torch.no_grad()
    def check(self, where: str) -> None:
        """Raise UserError unless the parts compute what the whole forward does, with these weights.

        Two rows, one of them padded on the left, in two passes with a cache.
        """
        model_type = self.config.model_type
        ids = torch.tensor([[3, 1, 4, 1, 5, 2], [0, 0, 2, 7, 1, 6]]) % self.embedding.shape[0]
        positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
        keys = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
        try:
            x, cache = self.embed(ids), SegmentCache(len(self.layers))
            for start, end in ((0, 4), (4, 6)):
                mask = additive_mask(keys, start, end, x.dtype)
                h = self.trunk(x[:, start:end], positions[:, start:end], mask, cache)
            ours = self.head(h[:, -1])
            raw = self.embed_tokens(ids) * self.scale_of_table
            rows = (raw[:1], raw[1:, 2:])
            self.config._attn_implementation = "eager"
            theirs = torch.cat(
                [self(inputs_embeds=row, use_cache=False).logits[:, -1] for row in rows]
            )
        # Whatever the library does with what it did not expect.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                where, f"model_type {model_type!r} cannot run in latent passes: {reason}"
            ) from None
        finally:
            self.config._attn_implementation = ATTENTION
        gap, largest = (a.abs().max().item() for a in (ours - theirs, theirs))
        if not gap <= SAME * largest:  # NaN too
            raise UserError(
                where,
                f"model_type {model_type!r}: padded and in passes it computes other logits"
                f" than transformers' own forward (by {gap:.2g} of {largest:.2g}); not supported",
            )

    scale_of_table = 1.0
    """The part of `scale` that transformers has in its embedding layer."""
    has_window = False
    """Whether some layers see only the nearest positions."""

    def _seen(self, positions: torch.Tensor, cache: Cache | None) -> torch.Tensor | None:
        """Positions (B, S) of all columns so far, kept in the cache behind the layers' keys."""
        if not self.has_window or cache is None:
            return None
        n = len(self.layers)
        for kept in (cache.keys, cache.values):
            if len(kept) == n:
                kept.append([])
        column = positions[:, None, :, None]
        return torch.cat(cache.update(n, column, column)[0], dim=2)[:, 0, :, 0]

    def run_inner(self, run: Callable, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self.stand_ins(run):
            # The inputs are read for their shape only: `run` gives the first block its own.
            out = self.model(inputs_embeds=x, position_ids=positions, use_cache=False)
            return out.last_hidden_state

    @contextmanager
    def stand_ins(self, run: Callable) -> Iterator[None]:
        slots = [block.__dict__["forward"] for block in self.layers]
        for slot in slots:
            slot.run = run
        try:
            yield
        finally:
            for slot in slots:
                slot.run = None
