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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from coconut.blocks import BorrowedVerbs, Tap
from cuda_coconut.models.base import Key, Mask, additive_mask, checkpointed, split_key
from cuda_coconut.models.cache import Cache, SegmentCache
from cuda_coconut.models.stand_ins import ATTENTION, Behind, Block, Sight, Slot, TiedHead


class Borrowed(BorrowedVerbs):
    """The verbs, mixed into a model class of the library's: its parameters keep their names."""

    library = "transformers"

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
        seen = self.seen(positions, cache)
        seen = None if seen is None else torch.cat(seen, dim=2)[:, 0, :, 0]
        sight = Sight(mask, positions, seen)
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

    @property
    def args(self):
        """The fields of config.json."""
        return self.config

    @property
    def layers(self):
        """The blocks."""
        return self.model.layers

    @property
    def unembedding(self) -> torch.Tensor:
        """Weights of the head (V, D)."""
        is_tied = isinstance(self.lm_head, TiedHead)
        return self.embed_tokens.weight if is_tied else self.lm_head.weight

    @torch.no_grad()
    def both_ways(self) -> tuple[np.ndarray, np.ndarray]:
        """Last logits of two rows: by the parts, in two passes, one row padded; by the whole."""
        ids = torch.tensor([[3, 1, 4, 1, 5, 2], [0, 0, 2, 7, 1, 6]]) % self.embedding.shape[0]
        positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
        keys = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
        x, cache = self.embed(ids), SegmentCache(len(self.layers))
        for start, end in ((0, 4), (4, 6)):
            mask = additive_mask(keys, start, end, x.dtype)
            h = self.trunk(x[:, start:end], positions[:, start:end], mask, cache)
        ours, raw = self.head(h[:, -1]), self.embed_tokens(ids) * self.scale_of_table
        self.config._attn_implementation = "eager"
        try:
            rows = (self(inputs_embeds=row, use_cache=False) for row in (raw[:1], raw[1:, 2:]))
            theirs = torch.cat([row.logits[:, -1] for row in rows])
        finally:
            self.config._attn_implementation = ATTENTION
        return ours.numpy(), theirs.numpy()

    scale_of_table = 1.0
    """The part of `scale` that transformers has in its embedding layer."""

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
