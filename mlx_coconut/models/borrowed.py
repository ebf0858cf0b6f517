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

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from coconut.checkpoints.architectures import resolved
from coconut.errors import UserError
from mlx_coconut.models.base import (
    NEVER,
    Tap,
    additive_mask,
    attend,
    checkpointed,
    is_recorded,
    split_key,
)
from mlx_coconut.models.cache import Cache, SegmentCache

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY_ROWS = (EMBEDDING, HEAD)
"""Tensors with a row a token, by their Hugging Face names; a tied head has none of its own."""
_GROUPED = ("gemma2",)
"""Whose attention gives the groups of heads an axis of their own, which the mask needs too."""
SAME = 1e-3
"""Of the largest logit: how far `check` lets the parts be from the whole. Seen: 1e-6."""


class _Positions:
    """The position of every token of a pass (B, T), in place of a cache's offset.

    Only `_Rotary` reads it. It is no number on purpose: a model that uses offsets for anything else
    fails in `check` instead of computing something wrong.
    """

    def __init__(self, of_tokens: mx.array):
        self.of_tokens = of_tokens


class _Rotary(nn.Module):
    """mlx_lm's rotary positions, for tokens that are not numbered from one offset on."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: Any = 0, **options) -> mx.array:
        """x (B, H, T, d), turned by each token's own position."""
        if not isinstance(offset, _Positions):
            return self.rope(x, offset=offset, **options)
        B, H, T, d = x.shape
        # mlx's kernel has an offset a row, so every token is given as a row of its own.
        rows = x.swapaxes(1, 2).reshape(B * T, H, 1, d)
        turned = self.rope(rows, offset=offset.of_tokens.reshape(-1), **options)
        return turned.reshape(B, T, H, d).swapaxes(1, 2)


class _LayerCache:
    """What mlx_lm takes for the cache of one layer: our masks, positions, keys and values."""

    def __init__(
        self,
        cache: Cache | None,
        layer: int,
        positions: mx.array,
        seen: mx.array | None = None,
        mask: mx.array | None = None,
        is_grouped: bool = False,
    ):
        self.cache, self.layer, self.mask, self.seen = cache, layer, mask, seen
        self.positions = positions
        self.offset = _Positions(positions)
        self.windows: set[int | None] = set()
        self.is_grouped = is_grouped

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """k, v (B, G, T, d) of the pass -> those of all columns so far."""
        if self.cache is None:
            return k, v
        keys, values = self.cache.update(self.layer, k, v)
        return _joined(keys), _joined(values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """What the queries of the pass may see, to add to the scores."""
        self.windows.add(window_size)
        mask = self.mask if window_size is None else self._windowed(window_size)
        return mask[:, :, None] if mask is not None and self.is_grouped else mask

    def _windowed(self, window_size: int) -> mx.array:
        keys = self.positions if self.seen is None else self.seen
        near = self.positions[:, :, None] - keys[:, None] < window_size
        far = (1 - near.astype(mx.float32)) * NEVER
        far = far[:, None]
        return far if self.mask is None else self.mask + far.astype(self.mask.dtype)


class _Slot:
    """Stands where mlx_lm looks for a block, and has `run` compute it."""

    def __init__(self, block, layer: int, run: Callable):
        self._block, self._layer, self._run = block, layer, run

    def __call__(self, h: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """As a block of mlx_lm's: nothing but a mask and a cache besides the states."""
        return self._run(self._layer, self._block, h, mask)

    def __getattr__(self, name: str):
        return getattr(self._block, name)


class _Block:
    """A block as `checkpointed` wants it."""

    draw = None

    def __init__(self, block):
        self.block = block
        self.update, self.trainable_parameters = block.update, block.trainable_parameters

    def __call__(self, x, mask, cache, layer, key, positions):
        if (draw := getattr(self.block, "draw", None)) is not None:
            draw.key = key
        # Recomputing asks for every input's gradient; a position has none.
        return self.block(x, mask, _LayerCache(cache, layer, mx.stop_gradient(positions)))


class _Behind:
    """Stands for the model below the head: whatever it is given, it returns h."""

    def __init__(self, inner, h: mx.array):
        self._inner, self._h = inner, h

    def __call__(self, *args, **options) -> mx.array:
        """h, as an array of its own: mlx_lm multiplies some in place."""
        return self._h + 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


class Borrowed:
    """The verbs, mixed into a model class of the library's: its parameters keep their names."""

    scale = 1.0
    """What the model multiplies its embeddings by."""
    shares_prompts = False
    """Its own code reads keys as one array of all rows; see `DecodeCache`."""

    def embed(self, ids: mx.array) -> mx.array:
        """What the first block reads, which thoughts replace: ids (B, T) -> (B, T, D)."""
        x = self.embed_tokens(ids)
        return x if self.scale == 1 else x * self.scale

    def trunk(
        self,
        x: mx.array,
        positions: mx.array,
        mask: mx.array | None = None,
        cache: Cache | None = None,
        key: mx.array | None = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> mx.array:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns the dropout of adapters on. mask: see `additive_mask`. checkpointing: recompute
        each block in the backward pass. tap: is shown the states between.
        """
        keys = split_key(key, len(self.layers))
        seen = self._seen(positions, cache)

        def run(layer: int, block, h: mx.array, block_mask: mx.array | None) -> mx.array:
            if layer == 0:
                h = x
                if tap:
                    tap(0, h)
            block = _Block(block)
            call = checkpointed(block) if checkpointing else block
            store = SegmentCache(len(self.layers)) if cache is None else cache
            h = call(h, block_mask, store, layer, keys[layer], positions)
            if tap:
                tap(layer + 1, h)
            return h

        grouped = self.model_type in _GROUPED and self._has_groups()
        sight = _LayerCache(None, 0, positions, seen, mask, grouped)
        with _shown_attention(self):
            return self._run_inner(run, sight, x.shape[:2])

    def head(self, h: mx.array) -> mx.array:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        inner = self.model
        # Into the dictionary itself: setting an attribute would move it behind the others.
        self["model"] = _Behind(inner, h)
        try:
            return self(mx.zeros((1, 1), mx.int32))
        finally:
            self["model"] = inner

    def final_norm(self, h: mx.array) -> mx.array:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        empty = _LayerCache(None, 0, mx.zeros((1, 1), mx.int32))
        return self._run_inner(lambda layer, block, _, mask: h, empty, (1, 1))

    def position_embedding(self, positions: mx.array) -> mx.array | None:
        """What `trunk` adds to the inputs at these positions: nothing."""
        return None

    @property
    def embed_tokens(self):
        """The table of input embeddings."""
        return self.model.embed_tokens

    @property
    def embedding(self) -> mx.array:
        """Input embeddings (V, D), as the first block reads them."""
        w = self.model.embed_tokens.weight
        return w if self.scale == 1 else w * self.scale

    @property
    def unembedding(self) -> mx.array:
        """Weights of the head (V, D)."""
        return self.lm_head.weight if "lm_head" in self else self.model.embed_tokens.weight

    @property
    def norm_kind(self) -> str:
        """Whether the final norm takes the mean away: `layer` or `rms`."""
        return "layer" if "LayerNorm" in type(self.model.norm).__name__ else "rms"

    def check(self, where: str) -> None:
        """Raise UserError unless the parts compute what the whole forward does, with these weights.

        Two rows, one of them padded on the left, in two passes with a cache.
        """
        ids = mx.array([[3, 1, 4, 1, 5, 2], [0, 0, 2, 7, 1, 6]]) % self.embed_tokens.weight.shape[0]
        positions = mx.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
        keys = mx.array([[True] * 6, [False] * 2 + [True] * 4])
        try:
            x, cache = self.embed(ids), SegmentCache(len(self.layers))
            for start, end in ((0, 4), (4, 6)):
                mask = additive_mask(keys, start, end, x.dtype)
                h = self.trunk(x[:, start:end], positions[:, start:end], mask, cache)
            ours = self.head(h[:, -1])
            theirs = mx.concatenate([self(ids[:1])[:, -1], self(ids[1:, 2:])[:, -1]])
            gap, largest = (mx.abs(a).max().item() for a in (ours - theirs, theirs))
        # Whatever the library does with what it did not expect.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                where, f"model_type {self.model_type!r} cannot run in latent passes: {reason}"
            ) from None
        if not gap <= SAME * largest:  # NaN too
            raise UserError(
                where,
                f"model_type {self.model_type!r}: padded and in passes it computes other logits"
                f" than mlx_lm's own forward (by {gap:.2g} of {largest:.2g}); not supported",
            )

    def _seen(self, positions: mx.array, cache: Cache | None) -> mx.array | None:
        """Positions (B, S) of all columns so far, kept in the cache behind the layers' keys."""
        if not self.has_window or cache is None:
            return None
        n = len(self.layers)
        for kept in (cache.keys, cache.values):
            if len(kept) == n:
                kept.append([])
        column = positions[:, None, :, None]
        return _joined(cache.update(n, column, column)[0])[:, 0, :, 0]

    def _has_groups(self) -> bool:
        return self.args.num_key_value_heads < self.args.num_attention_heads

    has_window = False
    """Whether some layers see only the nearest positions."""

    def _run_inner(self, run: Callable, cache: _LayerCache, shape: tuple[int, ...]) -> mx.array:
        with self._stand_ins(run):
            # The tokens are read for their shape only: `run` gives the first block its inputs.
            return self.model(mx.zeros(shape, mx.int32), cache=[cache] * len(self.layers))

    @contextmanager
    def _stand_ins(self, run: Callable) -> Iterator[None]:
        blocks = self.model.layers
        self.model["layers"] = [_Slot(block, i, run) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            self.model["layers"] = blocks


@contextmanager
def _shown_attention(model) -> Iterator[None]:
    """Where attention weights are asked for, let the model use our attention inside."""
    if not is_recorded():
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


def _joined(segments: list[mx.array]) -> mx.array:
    """Segments (B, G, S_i, d) as one array."""
    return segments[0] if len(segments) == 1 else mx.concatenate(segments, axis=2)


class _Naming:
    """Names of a borrowed model's tensors: those of Hugging Face, which mlx_lm keeps."""

    VOCABULARY_ROWS = VOCABULARY_ROWS

    def __init__(self, model, where: str):
        self._model, self._where = model, where

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face names -> ours; applied twice equals applied once.

        Raises UserError where mlx_lm renames or reshapes what it reads: it could not be written
        back.
        """
        own = {n: w for n, w in weights.items() if not n.endswith("rotary_emb.inv_freq")}
        if not hasattr(self._model, "sanitize") or EMBEDDING not in own:
            return own  # moments of an adapter's
        theirs = self._model.sanitize({HEAD: own[EMBEDDING]} | own)
        theirs.pop(HEAD, None)
        changed = [n for n, w in own.items() if n != HEAD and theirs.pop(n, None) is not w]
        if changed or theirs:
            raise UserError(
                self._where,
                f"{[*changed, *theirs][0]}: mlx_lm changes the tensors of a"
                f" {self._model.model_type} when it reads them, so they could not be written back;"
                " not supported",
            )
        return own

    def to_hf(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Our names -> Hugging Face names: the same."""
        return weights


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its names) for the config.json of an architecture that is not hand-written.

    Raises UserError if mlx_lm does not have it, or if it cannot be taken apart.
    """
    arch = _architecture(config["model_type"], where)
    try:
        config = resolved(config)
        kind = type("Model", (Borrowed, arch.Model), {})
        model = kind(arch.ModelArgs.from_dict(config))
        model.feedback = None  # ĥ itself; feedback.py puts other rules here
        tied = config["tie_word_embeddings"]
        if tied and "lm_head" in model:
            model.sanitize({})  # Gemma 3 has a head until it is shown a file without
        problem = _problem(model, tied)
        if problem is None:
            _find_ropes(model)
            problem = _measure(model)
    except UserError:
        raise
    # Whatever a wrong field makes the library stumble over.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            where, f"not a {config['model_type']} configuration that mlx_lm can use: {reason}"
        ) from None
    if problem:
        raise UserError(where, f"model_type {config['model_type']!r}: {problem}; not supported")
    return model, _Naming(model, where)


def _architecture(model_type: str, where: str):
    """mlx_lm's module of a model_type. Raises UserError if there is none."""
    import mlx_lm.utils  # takes seconds: it opens transformers

    name = mlx_lm.utils.MODEL_REMAPPING.get(model_type, model_type)
    try:
        arch = importlib.import_module(f"mlx_lm.models.{name}")
        assert hasattr(arch, "Model") and hasattr(arch, "ModelArgs")
    except (ImportError, AssertionError, SystemExit):
        raise UserError(
            where,
            f"model_type {model_type!r} is neither hand-written here (gpt2, qwen2) nor one of"
            f" mlx_lm {mlx_lm.__version__}",
        ) from None
    return arch


def _problem(model, tied: bool) -> str | None:
    """What of a model's build the verbs cannot deal with."""
    inner = model.get("model")
    if not all(name in (inner or {}) for name in ("embed_tokens", "layers", "norm")):
        return "its blocks are not where Llama keeps them (model.embed_tokens, layers, norm)"
    if set(model.children()) - {"model", "lm_head"}:
        return "it has parts besides its blocks and its head"
    if tied == ("lm_head" in model):
        return f"mlx_lm does not build it with tie_word_embeddings {tied}"
    if "bias" in model.get("lm_head", {}):
        return "its head has a bias"
    stray = [n for n, _ in tree_flatten(inner.parameters()) if not _OWN(n)]
    if stray:
        return f"it has weights of its own beside its blocks ({stray[0]})"
    odd = [n for n, w in tree_flatten(inner.layers[0].parameters()) if w.ndim > 2]
    return f"a block holds experts or convolutions ({odd[0]})" if odd else None


def _OWN(name: str) -> bool:
    return name.split(".")[0] in ("embed_tokens", "layers", "norm")


def _find_ropes(model) -> None:
    """Put `_Rotary` around everything in the blocks that turns by an offset."""
    for block in model.layers:
        for path, module in block.named_modules():
            if "offset" in inspect.signature(type(module).__call__).parameters:
                *parents, name = path.split(".")
                parent = block
                for part in parents:
                    parent = parent[part]
                parent[name] = _Rotary(module)


def _measure(model) -> str | None:
    """Find the factor of the embeddings and whether there are windows; what is odd about them."""
    inner, width = model.model, model.model.norm.weight.shape[0]
    table, seen = inner.embed_tokens, []

    def run(layer: int, block, h: mx.array, mask: mx.array | None) -> mx.array:
        if layer == 0:
            seen.append(h)
        return h

    probe = np.random.default_rng(0).standard_normal((1, 2, width)).astype(np.float32)
    probe[0, 0] = 1
    x, cache = mx.array(probe), _LayerCache(None, 0, mx.array([[0, 1]]))
    inner["embed_tokens"] = _Behind(table, x)
    try:
        model._run_inner(run, cache, (1, 2))
    finally:
        inner["embed_tokens"] = table
    factor = seen[0][0, 0, 0].item()
    if not mx.allclose(seen[0], x * factor, rtol=1e-5, atol=0).item():
        return "its embeddings pass through more than a factor before the first block"
    model.scale = factor
    model.has_window = bool(cache.windows - {None})
    return None
