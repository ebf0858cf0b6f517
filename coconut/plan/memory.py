"""The size of a model, from its config.json, and the memory that training and decoding it take."""

import math
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

from coconut.checkpoints.adapters import n_trained
from coconut.checkpoints.architectures import is_borrowed, n_positions
from coconut.checkpoints.source import Source
from coconut.checkpoints.verdict import args_of, judged
from coconut.config.keys import RunConfig


@dataclass(frozen=True)
class Shape:
    """What the size of a model follows from. kv_width: keys of all groups of a position."""

    vocab_size: int
    n_positions: int
    width: int
    n_layers: int
    n_heads: int
    kv_width: int
    inner: int
    n_params: int


def shape_of(model: dict[str, Any], vocab_size: int, where: str) -> Shape:
    """Sizes of a model from its config.json, with vocab_size rows in the embedding.

    Of a borrowed one n_params counts the matrices and two norms a block, as Llama has them.
    Raises UserError: see `judged`.
    """
    model = judged(model | {"vocab_size": vocab_size}, where)
    if model["model_type"] == "gpt2":
        args = args_of(model)
        width, layers, heads, inner = args.n_embd, args.n_layer, args.n_head, args.inner
        kv = width
    else:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        width, layers, heads, inner = (model[name] for name in names)
        size = model.get("head_dim") or width // heads
        own, kv = size * heads, size * (model.get("num_key_value_heads") or heads)
    if is_borrowed(model):
        block = 2 * width * (own + kv) + 3 * width * inner + 2 * width
        tables = 1 if model.get("tie_word_embeddings", False) else 2
        n_params = tables * vocab_size * width + layers * block + width
    else:
        n_params = sum(math.prod(shape) for shape in args_of(model).shapes().values())
    positions = n_positions(model) or model["max_position_embeddings"]
    return Shape(vocab_size, positions, width, layers, heads, kv, inner, n_params)


def training_bytes(
    shape: Shape,
    n_rows: int,
    length: int,
    n_targets: int,
    config: RunConfig,
    source: Source | None = None,
    n_behind: int = 0,
) -> int:
    """Estimated peak of a training step on a micro-batch of n_rows * length tokens.

    n_behind: columns from the first latent on; 0 without latents. source: tells of an adapter,
    beside which a frozen parameter costs 4 bytes, or if quantised its bits and 2 numbers of 4 bytes
    a group.

    The peak is in the update or in the backward pass. In the update a trained parameter costs 25
    bytes: weight, gradient and AdamW's moments 16, the new ones of some of them 9. In the backward
    pass it costs 12, and each layer keeps of a token 12 vectors of the width, 2 of the MLP's inner
    width, and a head's attention: 1.3 numbers a pair of columns before the latents, 4.3 a pair of
    one behind with any (keys in segments are not read by the fused kernel). With bf16 numbers have
    2 bytes, and a parameter 2 more for its copy. With gradient checkpointing each layer keeps 6
    vectors of the width and 6 of the keys' width, and two layers at a time the rest. A label keeps
    3 rows of the vocabulary, 4 bytes.

    Fitted to the MLX twin, GPT-2 small, second update, float32, x86-64: 4 rows of 480 tokens with 6
    latents took 3.82 GB with 67 columns behind, 5.09 with 247; the update alone 3.11.
    """
    size = 2 if config.bf16 else 4
    before = length - n_behind
    attention = shape.n_heads * (1.3 * before * before + 4.3 * n_behind * length)
    inside = (12 * shape.width + 2 * shape.inner) * length + attention
    kept = shape.n_layers * inside
    if config.gradient_checkpointing:
        kept = shape.n_layers * 6 * (shape.width + shape.kv_width) * length + 2 * inside
    frozen, n_trained = _weights(shape, source)
    backward = 12 * n_trained + n_rows * kept * size + 3 * 4 * n_targets * shape.vocab_size
    copies = 2 * config.bf16 * shape.n_params
    return int(frozen + max(25 * n_trained, backward) + copies)


def _weights(shape: Shape, source: Source | None) -> tuple[float, int]:
    """(bytes of what is frozen, parameters that are trained)."""
    if source is None or source.adapter is None:
        return 0, shape.n_params
    lora = source.adapter.lora
    quantized = source.config.get("quantization") or {}
    bits = lora.quantize or quantized.get("bits")
    group = lora.group_size if lora.quantize else quantized.get("group_size", 64)
    stored = bits / 8 + 8 / group if bits else 4
    return shape.n_params * stored, n_trained(source.config, lora, len(source.adapter.rows))


def too_large(n_bytes: int, keys: str) -> str | None:
    """What to say of a batch that a Mac's GPU has no room for; None if it has, or is no Mac's.

    keys: what to change.
    """
    room = gpu_memory()
    if room is None or n_bytes < room:
        return None
    return (
        f"this machine's GPU may use about {room / 1e9:.1f} GB, a batch needs {n_bytes / 1e9:.1f}:"
        f" change {keys} (docs/on_a_mac.md)"
    )


def gpu_memory() -> int | None:
    """Bytes that Metal lets one program use on this Mac; None elsewhere.

    Two thirds of memory up to 36 GB, three quarters above: what Metal recommends as the working set
    unless `sysctl iogpu.wired_limit_mb` says otherwise.
    """
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total * 2 // 3 if total <= 36 << 30 else total * 3 // 4


def evaluation_bytes(
    shape: Shape, n_rows: int, length: int, new_tokens: int, bf16: bool = False
) -> int:
    """Estimated peak of decoding a batch: prompts of `length` tokens and the new ones.

    A parameter costs 4 bytes (with bf16 2 more for its copy). A token keeps its keys and values in
    each layer, twice while the latent passes' are joined; while the prompts are read, one layer
    holds 6 vectors of the width, 2 of the MLP's inner width and one attention row a token. The
    logits are one row of the vocabulary a question. Measured on GPT-2 small, 8 * 390 tokens: 1.3 GB
    against 1.2 estimated.
    """
    size = 2 if bf16 else 4
    cache = n_rows * (2 * length + new_tokens) * 2 * shape.kv_width * shape.n_layers
    inside = 6 * shape.width + 2 * shape.inner + shape.n_heads * length
    parameters = shape.n_params * (4 + 2 * bf16)
    return parameters + (cache + n_rows * length * inside) * size + 4 * n_rows * shape.vocab_size
