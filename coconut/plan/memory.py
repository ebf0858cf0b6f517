"""The size of a model, from its config.json, and the memory that training and decoding it take."""

import math
from dataclasses import dataclass
from typing import Any

from coconut.checkpoints.adapters import n_trained
from coconut.checkpoints.architectures import is_borrowed, n_positions
from coconut.checkpoints.source import Source
from coconut.checkpoints.verdict import args_of, judged


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
    bf16: bool = False,
    checkpointing: bool = False,
) -> int:
    """Estimated peak of a training step on a micro-batch of n_rows * length tokens.

    A parameter costs 16 bytes: weight 4, gradient 4, AdamW's moments 8; with bf16 2 more for its
    copy. A token keeps, in each layer, 12 vectors of the width, 2 of the MLP's inner width and 3
    attention rows (heads * length), of 4 bytes (bf16 2). With gradient checkpointing it keeps, in
    each layer, 6 vectors of the width and 6 of the keys' width, and two layers at a time the rest.
    A label keeps 3 rows of the vocabulary, 4 bytes. The counts are fitted to the MLX twin: GPT-2
    small, 4 * 480 tokens, 6 latents, 240 labels, second update, float32 on x86-64, took 5.1 GB.
    """
    size = 2 if bf16 else 4
    tokens = n_rows * length
    inside = 12 * shape.width + 2 * shape.inner + 3 * shape.n_heads * length
    kept = shape.n_layers * inside
    if checkpointing:
        kept = shape.n_layers * 6 * (shape.width + shape.kv_width) + 2 * inside
    parameters = shape.n_params * (16 + 2 * bf16)
    return parameters + tokens * kept * size + 3 * 4 * n_targets * shape.vocab_size


def frozen_bytes(shape: Shape, source: Source, bf16: bool = False) -> int:
    """What of `training_bytes` a frozen base does not need.

    Gradient and moments, 12 bytes a parameter; of a quantised one all but its bits and 2 numbers of
    4 bytes a group. What is trained costs its 16 bytes.
    """
    assert source.adapter is not None, "nothing is frozen otherwise"
    lora = source.adapter.lora
    quantized = source.config.get("quantization") or {}
    bits = lora.quantize or quantized.get("bits")
    group = lora.group_size if lora.quantize else quantized.get("group_size", 64)
    saved = 12.0 if not bits else 16 - bits / 8 - 8 / group
    n = n_trained(source.config, lora, len(source.adapter.rows))
    return int(shape.n_params * saved) - n * (16 + 2 * bf16)


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
