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

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coconut.checkpoints.architectures import BF16_SCALE, resolved
from coconut.errors import UserError
from cuda_coconut.models.base import (
    NEVER,
    Key,
    Mask,
    Tap,
    additive_mask,
    as_linear,
    attend,
    checkpointed,
    is_recorded,
    split_key,
)
from cuda_coconut.models.cache import Cache, SegmentCache

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY_ROWS = (EMBEDDING, HEAD)
"""Tensors with a row a token, by their Hugging Face names; a tied head has none of its own."""
_ATTENTION = "coconut"
"""The name that our attention is registered by in transformers."""
_CACHE = ("cache", "past_key_values")
"""What a block calls its cache, from transformers 5.24 on and before."""
SAME = 1e-3
"""Of the largest logit: how far `check` lets the parts be from the whole. Seen: 1e-6."""


class _Sight:
    """What the queries of a pass may see. transformers hands it to our attention as the mask.

    mask: to add to the scores, see `attend`. positions (B, T) of the pass, seen (B, S) of all
    columns.
    """

    def __init__(self, mask: Mask, positions: torch.Tensor, seen: torch.Tensor | None):
        self.mask, self.positions = mask, positions
        self.seen = positions if seen is None else seen
        self._windowed: dict[int, torch.Tensor] = {}

    def within(self, window: int | None, dtype: torch.dtype) -> Mask:
        """The mask of a layer that sees only the positions less than `window` before."""
        if window is None:
            return self.mask
        if window not in self._windowed:
            near = self.positions[:, :, None] - self.seen[:, None] < window
            if isinstance(self.mask, str):
                near = near.tril()
            far = torch.zeros(near.shape, dtype=dtype, device=near.device)
            far = far.masked_fill_(~near, NEVER)[:, None]
            is_tensor = isinstance(self.mask, torch.Tensor)
            self._windowed[window] = far + self.mask if is_tensor else far
        return self._windowed[window]


class _LayerCache:
    """What transformers takes for the cache: our keys and values of one layer."""

    def __init__(self, cache: Cache, layer: int):
        self.cache, self.layer = cache, layer

    def update(self, k: torch.Tensor, v: torch.Tensor, *unused, **options):
        """k, v (B, G, T, d) of the pass -> the segments of all columns so far."""
        return self.cache.update(self.layer, k, v)


class _Slot:
    """Stands in place of a block's forward, and has the model's `run` compute it, if there is one.

    run: None lets transformers' own forward through.
    """

    def __init__(self, block: nn.Module, layer: int):
        self.forward, self.layer, self.cache_name = block.forward, layer, _cache_name(block)
        self.run: Callable | None = None

    def __call__(self, h: torch.Tensor, **options) -> torch.Tensor:
        """As a block of transformers': all but the states by name."""
        if self.run is None:
            return self.forward(h, **options)
        return self.run(self, h, options)


class _Block:
    """A block as `checkpointed` wants it."""

    def __init__(self, slot: _Slot):
        self.slot = slot

    def __call__(self, x, mask, cache, layer, key, options):
        own = {"attention_mask": mask, self.slot.cache_name: _LayerCache(cache, layer)}
        return self.slot.forward(x, **options | own)


class _Behind:
    """Stands for the model below the head: whatever it is given, it returns h."""

    def __init__(self, inner: nn.Module, h: torch.Tensor):
        self._inner, self._h = inner, h

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def __call__(self, *args, **options):
        """h, as transformers' models return it."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._h)


class _TiedHead(nn.Module):
    """A head that is the table of input embeddings, whatever stands there; it owns no weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._of = (model,)  # in a tuple, so that it is no part of this module

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """States (..., D) -> logits (..., V)."""
        return as_linear(self._of[0].model.embed_tokens, h)


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
        key: Key | None = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> torch.Tensor:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns the dropout of adapters on. mask: see `additive_mask`. checkpointing: recompute
        each block in the backward pass. tap: is shown the states between.
        """
        keys = split_key(key, len(self.layers))
        sight = _Sight(mask, positions, self._seen(positions, cache))
        store = SegmentCache(len(self.layers)) if cache is None else cache

        def run(slot: _Slot, h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            if slot.layer == 0:
                h = x
                if tap:
                    tap(0, h)
            if self.draw is not None:
                self.draw.key = keys[slot.layer]
            block = _Block(slot)
            call = checkpointed(block) if checkpointing else block
            h = call(h, sight, store, slot.layer, keys[slot.layer], options)
            if tap:
                tap(slot.layer + 1, h)
            return h

        return self._run_inner(run, x, positions)

    draw = None
    """Where adapters with dropout find the key of the block; see adapters.py."""

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        # Found before the module of that name: transformers' own code runs behind it.
        self.__dict__["model"] = _Behind(self.model, h.reshape(1, -1, h.shape[-1]))
        try:
            logits = self(inputs_embeds=h).logits
        finally:
            del self.__dict__["model"]
        return logits.view(*h.shape[:-1], -1)

    def final_norm(self, h: torch.Tensor) -> torch.Tensor:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        x = h.reshape(1, -1, h.shape[-1])
        zero = torch.zeros(x.shape[:2], dtype=torch.long, device=h.device)
        return self._run_inner(lambda slot, *_: x, x, zero).view(h.shape)

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
        is_tied = isinstance(self.lm_head, _TiedHead)
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
            raw = self.embed_tokens(ids) * self._scale_of_table
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
            self.config._attn_implementation = _ATTENTION
        gap, largest = (a.abs().max().item() for a in (ours - theirs, theirs))
        if not gap <= SAME * largest:  # NaN too
            raise UserError(
                where,
                f"model_type {model_type!r}: padded and in passes it computes other logits"
                f" than transformers' own forward (by {gap:.2g} of {largest:.2g}); not supported",
            )

    _scale_of_table = 1.0
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

    def _run_inner(self, run: Callable, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self._stand_ins(run):
            # The inputs are read for their shape only: `run` gives the first block its own.
            out = self.model(inputs_embeds=x, position_ids=positions, use_cache=False)
            return out.last_hidden_state

    @contextmanager
    def _stand_ins(self, run: Callable) -> Iterator[None]:
        slots = [block.__dict__["forward"] for block in self.layers]
        for slot in slots:
            slot.run = run
        try:
            yield
        finally:
            for slot in slots:
                slot.run = None


class _Naming:
    """Names of a borrowed model's tensors: those of Hugging Face, which transformers keeps."""

    VOCABULARY_ROWS = VOCABULARY_ROWS

    def sanitize(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hugging Face names -> ours; applied twice equals applied once."""
        return {n: w for n, w in weights.items() if not n.endswith("rotary_emb.inv_freq")}

    def to_hf(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our names -> Hugging Face names: the same."""
        return weights


def _attention(
    module,
    q: torch.Tensor,
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    sight: _Sight,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Our attention, as transformers calls one: q (B, H, T, d) -> (B, T, H, d).

    k, v: segments, see `attend`. softcap: bound of the scores (Gemma 2).
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    if softcap is not None and is_recorded():
        raise UserError(
            f"model_type {module.config.model_type!r}",
            "its attention cannot be looked into: its scores are bent before they become weights",
        )
    mask, d = sight.within(sliding_window, q.dtype), q.shape[-1]
    if scaling is not None:
        q = q * (scaling * d**0.5)  # attend divides by sqrt(d)
    out = attend(q, k, v, mask) if softcap is None else _capped(q, k, v, mask, softcap)
    return out.transpose(1, 2), None


def _capped(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    mask: Mask,
    bound: float,
) -> torch.Tensor:
    """As `attend`, with scores bent to stay within (-bound, bound)."""
    B, H, T, d = q.shape
    k, v = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    grouped = (q * d**-0.5).reshape(B, k.shape[1], -1, d)
    scores = ((grouped @ k.transpose(-1, -2)) / bound).tanh() * bound
    scores = scores.view(B, H, T, -1)
    if isinstance(mask, str):
        mask = torch.full((T, T), NEVER, dtype=q.dtype, device=q.device).triu_(1)
    p = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32)
    out = p.to(v.dtype).view(B, k.shape[1], -1, p.shape[-1]) @ v
    return out.view(B, H, T, d)


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its names) for the config.json of an architecture that is not hand-written.

    Raises UserError if transformers does not have it, or if it cannot be taken apart.
    """
    model_type = config["model_type"]
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError:
        raise UserError(
            where,
            f"model_type {model_type!r} is not hand-written here (gpt2, qwen2), and the torch twin"
            " borrows others from transformers: pip install 'transformers>=5.0'",
        ) from None
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            where,
            f"model_type {model_type!r} is neither hand-written here (gpt2, qwen2) nor one of"
            f" transformers {transformers.__version__}",
        )
    transformers.AttentionInterface.register(_ATTENTION, _attention)
    try:
        fields = {n: v for n, v in resolved(config).items() if n not in ("model_type", "auto_map")}
        if fields.get("rope_parameters"):  # says it all; the other spellings are mlx_lm's
            for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
                fields.pop(name, None)
        # Of no use here, and refused where they do not fit a small vocabulary.
        fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        described = transformers.AutoConfig.for_model(model_type, **fields)
        # Not on the meta device: the rotary frequencies are no weights, and no file has them.
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, attn_implementation=_ATTENTION
            )
        model.eval()
        model.__class__ = type("Model", (Borrowed, type(model)), {})
        model.feedback = None  # ĥ itself; feedback.py puts other rules here
        problem = _problem(model, resolved(config)["tie_word_embeddings"])
        problem = problem or _prepare(model)
    # Whatever a wrong field makes the library stumble over.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            where, f"not a {model_type} configuration that transformers can use: {reason}"
        ) from None
    if problem:
        raise UserError(where, f"model_type {model_type!r}: {problem}; not supported")
    return model, _Naming()


def _problem(model, tied: bool) -> str | None:
    """What of a model's build the verbs cannot deal with."""
    inner = getattr(model, "model", None)
    if not all(hasattr(inner, name) for name in ("embed_tokens", "layers", "norm")):
        return "its blocks are not where Llama keeps them (model.embed_tokens, layers, norm)"
    if set(dict(model.named_children())) - {"model", "lm_head", "feedback"}:
        return "it has parts besides its blocks and its head"
    if tied != model.config.tie_word_embeddings:
        return f"transformers does not build it with tie_word_embeddings {tied}"
    if model.lm_head.bias is not None:
        return "its head has a bias"
    names = [n for n, _ in inner.named_parameters()]
    stray = [n for n in names if n.split(".")[0] not in ("embed_tokens", "layers", "norm")]
    if stray:
        return f"it has weights of its own beside its blocks ({stray[0]})"
    odd = [n for n, w in inner.layers[0].named_parameters() if w.ndim > 2]
    if odd:
        return f"a block holds experts or convolutions ({odd[0]})"
    if "attention_mask" not in _accepted(inner.layers[0]):
        return "its blocks take no attention_mask"
    return None if _cache_name(inner.layers[0]) else f"its blocks take no {' or '.join(_CACHE)}"


def _accepted(block: nn.Module) -> set[str]:
    """Names of what a block's forward takes."""
    return set(inspect.signature(type(block).forward).parameters)


def _cache_name(block: nn.Module) -> str:
    """What a block calls its cache; empty if it takes none."""
    return next((name for name in _CACHE if name in _accepted(block)), "")


def _prepare(model) -> str | None:
    """Put stand-ins in their places, find the factor of the embeddings; what is odd about them."""
    inner, described = model.model, model.config
    for layer, block in enumerate(inner.layers):
        block.forward = _Slot(block, layer)
    kinds = getattr(described, "layer_types", None) or []
    window = getattr(described, "sliding_window", None)
    model.has_window = window is not None and (not kinds or "sliding_attention" in kinds)
    table = inner.embed_tokens
    factor = _factors(model, table)
    if factor is None:
        return "its embeddings pass through more than a factor before the first block"
    model._scale_of_table, model.scale = factor
    if described.model_type in BF16_SCALE:
        # As mlx_lm, and as in training: float32's sqrt(D) would be another model by 0.2 %.
        rounded = float(torch.tensor(model.scale).to(torch.bfloat16))
        model._scale_of_table = model.scale = rounded
    # A plain table: a layer that multiplies would be in the way of trained rows, and one that knows
    # a padding token would give that row no gradient, though it may be eos.
    inner.embed_tokens = nn.Embedding(*table.weight.shape, _weight=table.weight)
    if described.tie_word_embeddings:
        model.lm_head = _TiedHead(model)
    buffers = set(model.state_dict()) - {n for n, _ in model.named_parameters()}
    return f"it keeps {min(buffers)} beside its weights" if buffers else None


@torch.no_grad()
def _factors(model, table: nn.Module) -> tuple[float, float] | None:
    """What the embedding layer multiplies by, and what reaches the first block by; None if more."""
    probe = torch.randn(2, table.weight.shape[1], generator=torch.Generator().manual_seed(0))
    probe[0] = 1
    ids, seen = torch.tensor([[0, 1]]), []

    def run(slot: _Slot, h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if slot.layer == 0:
            seen.append(h)
        return h

    table.__dict__["weight"] = probe  # found before the parameter of that name
    try:
        seen.append(table(ids))
        with model._stand_ins(run):
            model.model(input_ids=ids, use_cache=False)
    finally:
        del table.__dict__["weight"]
    factors = [h[0, 0, 0].item() for h in seen]
    plain = F.embedding(ids, probe)
    same = [
        torch.allclose(h, plain * c, rtol=1e-5, atol=0) for h, c in zip(seen, factors, strict=True)
    ]
    return (factors[0], factors[1]) if all(same) else None
