"""Qwen2 and Qwen2.5 as published (rotary positions, grouped queries, RMS norms, SwiGLU).

Source: Yang et al. 2024; names follow transformers' Qwen2ForCausalLM.
Departs from it: the prefix `model.` is dropped on reading and put back by `to_hf`; a sliding window
and scaled rotary positions (YaRN, linear, ...) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_coconut.models.base import Tap, attend, checkpointed, split_key
from mlx_coconut.models.cache import Cache
from mlx_coconut.models.cpu import tanh

VOCABULARY_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row a token, by their Hugging Face names; a tied head has none of its own."""

Rotation = tuple[mx.array, mx.array]
"""Cosine and sine of every position's angles, (B, T, 1, d/2) each, float32."""


@dataclass
class ModelArgs:
    """The fields of config.json that Qwen2 is built from, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """The newer spelling; its rope_theta counts before the field of that name."""
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported, only silu")
        if self.use_sliding_window or set(self.layer_types or ()) - {"full_attention"}:
            raise ValueError("sliding-window attention is not supported; every layer must be full")
        for name in ("rope_scaling", "rope_parameters"):
            rope = getattr(self, name) or {}
            if not isinstance(rope, dict):
                raise ValueError(f"{name}: expected an object or null")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ValueError(
                    f"{name}: rotary positions of type {kind!r} are not supported; up to the"
                    " length that the model was trained with it works without them: remove the type"
                )
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} keys"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads}"
                    " heads"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads


def rotation(positions: mx.array, head_dim: int, theta: float) -> Rotation:
    """Cosine and sine for positions (B, T) int; computed once a pass for all layers."""
    frequencies = theta ** -(mx.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, :, None, None].astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, rotation: Rotation) -> mx.array:
    """Turn the pairs (i, i + d/2) of x (B, T, H, d) by their position's angles, in float32."""
    cos, sin = rotation
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim, self.attention_dropout = args.head_dim, args.attention_dropout
        own, shared = (
            n * args.head_dim for n in (args.num_attention_heads, args.num_key_value_heads)
        )
        self.q_proj = nn.Linear(args.hidden_size, own)
        self.k_proj = nn.Linear(args.hidden_size, shared)
        self.v_proj = nn.Linear(args.hidden_size, shared)
        self.o_proj = nn.Linear(own, args.hidden_size, bias=False)

    def __call__(self, x, mask, cache, layer, key, rotation):
        B, T, _ = x.shape
        q, k, v = (
            project(x).reshape(B, T, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (
            part.transpose(0, 2, 1, 3) for part in (rotate(q, rotation), rotate(k, rotation), v)
        )
        keys, values = ([k], [v]) if cache is None else cache.update(layer, k, v)
        out = attend(q, keys, values, mask, self.attention_dropout, key)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    draw = None
    """Where adapters with dropout find the key of the block; see mlx_coconut/models/adapters.py."""

    def __call__(self, x, mask, cache, layer, key, rotation):
        if self.draw is not None:
            self.draw.key = key
        x = x + self.self_attn(self.input_layernorm(x), mask, cache, layer, key, rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Qwen2 in the three verbs that latent passes need."""

    shares_prompts = True
    """Whether attention reads the keys of a prompt that several rows go on from; see `Shared`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.norm_kind = "rms"
        self.feedback = None  # ĥ itself; feedback.py puts other rules here
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def embed(self, ids: mx.array) -> mx.array:
        """Token embeddings, which thoughts replace: ids (B, T) -> (B, T, D)."""
        return self.embed_tokens(ids)

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

        key: turns dropout on. mask: see `additive_mask`. checkpointing: recompute each block in the
        backward pass. tap: is shown the states between.
        """
        angles = rotation(positions, self.args.head_dim, self.args.rope_theta)
        keys = split_key(key, len(self.layers))
        if tap:
            tap(0, x)
        for layer, block in enumerate(self.layers):
            run = checkpointed(block) if checkpointing else block
            x = run(x, mask, cache, layer, keys[layer], angles)
            if tap:
                tap(layer + 1, x)
        return self.norm(x)

    def head(self, h: mx.array) -> mx.array:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        tied = self.args.tie_word_embeddings
        return self.embed_tokens.as_linear(h) if tied else self.lm_head(h)

    def final_norm(self, h: mx.array) -> mx.array:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        return self.norm(h)

    def position_embedding(self, positions: mx.array) -> mx.array | None:
        """What `trunk` adds to the inputs at these positions: nothing."""
        return None

    @property
    def embedding(self) -> mx.array:
        """Input embeddings (V, D)."""
        return self.embed_tokens.weight

    @property
    def unembedding(self) -> mx.array:
        """Weights of the head (V, D)."""
        tied = self.args.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight


@partial(mx.compile, shapeless=True)
def _swiglu_forward(gate: mx.array, up: mx.array) -> mx.array:
    return 0.5 * gate * (1 + tanh(0.5 * gate)) * up


@partial(mx.compile, shapeless=True)
def _swiglu_backward(
    gate: mx.array, up: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    sigmoid = 0.5 * (1 + tanh(0.5 * gate))
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu_forward(gate, up)


@_swiglu.vjp
def _swiglu_vjp(primals, cotangent, output):
    # Recomputed from the inputs: nothing else is kept for the backward pass.
    return _swiglu_backward(*primals, cotangent)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    # twin: MLX's sigmoid is scalar on x86: 2.6 M float32 elements take 36 ms, this 11 ms.
    if mx.default_device() == mx.cpu and gate.dtype == mx.float32:
        return _swiglu(gate, up)
    return nn.silu(gate) * up


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Hugging Face names -> ours; applied twice equals applied once."""
    return {name.removeprefix("model."): w for name, w in weights.items()}


def to_hf(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Our names -> Hugging Face names: all but the head's carry `model.`."""
    return {n if n == "lm_head.weight" else f"model.{n}": w for n, w in weights.items()}
