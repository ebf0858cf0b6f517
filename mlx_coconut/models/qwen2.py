"""Qwen2 and Qwen2.5 as published (rotary positions, grouped queries, RMS norms, SwiGLU).

Source: Yang et al. 2024; names follow transformers' Qwen2ForCausalLM.
Departs from it: the prefix `model.` is dropped on reading and put back by `to_hf`; a sliding window
and scaled rotary positions (YaRN, linear, ...) are refused.
"""

import mlx.core as mx
import mlx.nn as nn

from coconut.blocks import Tap, run_blocks
from coconut.checkpoints.model_args import Qwen2Args as ModelArgs
from mlx_coconut.models.base import Key, Mask, attend, checkpointed, split_key
from mlx_coconut.models.cache import Cache
from mlx_coconut.models.cpu import swiglu

VOCABULARY_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row a token, by their Hugging Face names; a tied head has none of its own."""

Angles = tuple[mx.array, mx.array]
"""Cosine and sine of every position's angles, (B, T, 1, d/2) each, float32."""


def rotation(positions: mx.array, head_dim: int, theta: float) -> Angles:
    """Cosine and sine for positions (B, T) int; computed once a pass for all layers."""
    frequencies = theta ** -(mx.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, :, None, None].astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, angles: Angles) -> mx.array:
    """Turn the pairs (i, i + d/2) of x (B, T, H, d) by their position's angles, in float32."""
    cos, sin = angles
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

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, layer: int, key: Key, angles: Angles
    ) -> mx.array:
        """Every token reads those before it: x (B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = (
            project(x).reshape(B, T, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (rotate(q, angles), rotate(k, angles), v))
        keys, values = ([k], [v]) if cache is None else cache.update(layer, k, v)
        out = attend(q, keys, values, mask, self.attention_dropout, key)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Each token by itself: x (B, T, D) -> (B, T, D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    def __call__(
        self, x: mx.array, mask: Mask, cache: Cache | None, layer: int, key: Key, angles: Angles
    ) -> mx.array:
        """Attention, then the MLP, each added to the residual stream: x (B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache, layer, key, angles)
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
        mask: Mask = None,
        cache: Cache | None = None,
        key: Key = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> mx.array:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns dropout on. mask: see `additive_mask`. checkpointing: recompute each block in the
        backward pass. tap: is shown the states between.
        """
        angles = rotation(positions, self.args.head_dim, self.args.rope_theta)
        keys = split_key(key, len(self.layers))
        blocks = map(checkpointed, self.layers) if checkpointing else self.layers
        return self.norm(run_blocks(blocks, x, mask, cache, keys, angles, tap=tap))

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


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Hugging Face names -> ours; applied twice equals applied once."""
    return {name.removeprefix("model."): w for name, w in weights.items()}


def to_hf(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Our names -> Hugging Face names: all but the head's carry `model.`."""
    return {n if n == "lm_head.weight" else f"model.{n}": w for n, w in weights.items()}
