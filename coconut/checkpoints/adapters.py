"""Low-rank adapters: which layers get one, how they are called, and the files that hold them.

A layer y = W x + b becomes y = W x + b + scale * lora_b' lora_a' x (LoRA, arXiv 2106.09685); DoRA
(arXiv 2402.09353) then gives each row of the whole weight the learned length m. The embedding rows
of the latent tokens are trained as they are, beside them: the markers mean nothing before.

    adapters.safetensors   the factors, in mlx_lm's layout: `mlx_lm.load(base, adapter_path=...)`
    trained.safetensors    whatever is trained whole (the rows), exactly
    adapter_config.json    mlx_lm's fields, and under `coconut` ours: the base and its fingerprint

Names here are module paths of the model: h.0.attn.c_attn.lora_a (inputs, rank), .lora_b (rank,
outputs), .m (outputs,), wte.rows (n, width).
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coconut.checkpoints.architectures import TRIED, is_borrowed
from coconut.config.lora_keys import Lora
from coconut.errors import UserError

TRAINED, ADAPTER_CONFIG = "trained.safetensors", "adapter_config.json"
FUSED = ("phi3",)
"""Whose blocks hold query, key and value in one layer, and gate and up in one."""
LEAVES = ("lora_a", "lora_b", "m")
"""Names of an adapter's arrays, mlx_lm's."""


@dataclass(frozen=True)
class Adapter:
    """What is trained beside a frozen base.

    rows: tokens whose embedding rows are trained. base: directory or hub name of the frozen model,
    revision: of the hub's; base_sha256: fingerprint of its weight files. new_tokens: rows that the
    base was given when the adapter began. directory: where trained values lie, None for an adapter
    that begins.
    """

    lora: Lora
    rows: tuple[int, ...]
    base: str
    base_sha256: str
    new_tokens: range
    directory: Path | None
    revision: str | None = None
    seed: int = 0
    """Of the first values, and of new rows of the base."""


def linear_layers(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a block, by its path in the block."""
    if config["model_type"] == "gpt2":
        width = config["n_embd"]
        inner = config.get("n_inner") or 4 * width
        return {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }
    if is_borrowed(config) and config["model_type"] not in TRIED:
        raise UserError(
            "lora",
            f"the linear layers of a {config['model_type']} are not known here, those of"
            f" {', '.join(TRIED)} are; train it whole: remove the keys of lora",
        )
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    shared = size * (config.get("num_key_value_heads") or heads)
    fused = {
        "self_attn.qkv_proj": (width, heads * size + 2 * shared),
        "self_attn.o_proj": (heads * size, width),
        "mlp.gate_up_proj": (width, 2 * inner),
        "mlp.down_proj": (inner, width),
    }
    if config["model_type"] in FUSED:
        return fused
    return {
        "self_attn.q_proj": (width, heads * size),
        "self_attn.k_proj": (width, shared),
        "self_attn.v_proj": (width, shared),
        "self_attn.o_proj": (heads * size, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }


def n_layers(config: Mapping[str, Any]) -> int:
    """Blocks of a model, by the field of its architecture."""
    return config["n_layer"] if config["model_type"] == "gpt2" else config["num_hidden_layers"]


def blocks(config: Mapping[str, Any]) -> str:
    """Path of the list of blocks in a model."""
    return {"gpt2": "h", "qwen2": "layers"}.get(config["model_type"], "model.layers")


def targets(config: Mapping[str, Any], lora: Lora) -> list[str]:
    """Paths in a block of the layers that get an adapter. Raises UserError for a name unknown."""
    known = linear_layers(config)
    if lora.targets == ["all"]:
        return list(known)
    unknown = [
        name for name in lora.targets if not any(f".{path}".endswith(f".{name}") for path in known)
    ]
    if unknown:
        raise UserError(
            "lora.targets",
            f"{', '.join(unknown)}: no linear layer of a {config['model_type']} block; there are"
            f" {', '.join(known)}, or all",
        )
    return [p for p in known if any(f".{p}".endswith(f".{name}") for name in lora.targets)]


def adapted_layers(config: Mapping[str, Any], lora: Lora) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every layer with an adapter, by its path in the model."""
    total = n_layers(config)
    if lora.layers is not None and lora.layers > total:
        raise UserError("lora.layers", f"the model has {total} blocks, fewer than {lora.layers}")
    shapes = linear_layers(config)
    if lora.quantize is not None:
        odd = [f"{p} ({i} inputs)" for p, (i, _) in shapes.items() if i % lora.group_size]
        if odd:
            raise UserError(
                "lora.group_size", f"{lora.group_size} does not divide the inputs of {odd[0]}"
            )
    numbers = range(total - (lora.layers or total), total)
    return {
        f"{blocks(config)}.{block}.{path}": shapes[path]
        for block in numbers
        for path in targets(config, lora)
    }


def vocabulary(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the modules with a row a token: the embedding, and a head of its own."""
    is_gpt2 = config["model_type"] == "gpt2"
    table = "wte" if is_gpt2 else "model.embed_tokens" if is_borrowed(config) else "embed_tokens"
    return (table,) if config.get("tie_word_embeddings", is_gpt2) else (table, "lm_head")


def trained_shapes(
    config: Mapping[str, Any], lora: Lora, n_rows: int
) -> dict[str, tuple[int, ...]]:
    """Shape of every array that is trained."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (inputs, outputs) in adapted_layers(config, lora).items():
        shapes[f"{path}.lora_a"] = (inputs, lora.rank)
        shapes[f"{path}.lora_b"] = (lora.rank, outputs)
        if lora.type == "dora":
            shapes[f"{path}.m"] = (outputs,)
    width = config["n_embd" if config["model_type"] == "gpt2" else "hidden_size"]
    if n_rows:
        shapes.update({f"{path}.rows": (n_rows, width) for path in vocabulary(config)})
    return shapes


def n_trained(config: Mapping[str, Any], lora: Lora, n_rows: int) -> int:
    """Numbers that are trained."""
    return sum(math.prod(shape) for shape in trained_shapes(config, lora, n_rows).values())


def in_words(adapter: Adapter, config: Mapping[str, Any]) -> str:
    """What is trained, for the plan of a run."""
    lora = adapter.lora
    blocks = "all blocks" if lora.layers is None else f"the last {lora.layers} blocks"
    words = f"{lora.type} of rank {lora.rank}, scale {lora.scale:g}, on"
    words += f" {', '.join(targets(config, lora))} of {blocks}"
    if adapter.rows:
        words += f", and the rows of tokens {', '.join(map(str, adapter.rows))}"
    return words


def check_twin(twin: str, lora: Lora | None, config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for what the torch twin cannot do: quantised weights."""
    if twin != "cuda_coconut":
        return
    if lora is not None and lora.quantize is not None:
        raise UserError(
            "lora.quantize",
            "this twin does not quantise: bitsandbytes needs CUDA and its numbers are not MLX's;"
            " remove the key, or train with mlx_coconut; of a checkpoint that has it"
            " mlx-coconut fuse makes a float one",
        )
    if config.get("quantization"):
        raise UserError(
            where,
            "weights quantised by MLX, which torch cannot read; open it with mlx_coconut, or make a"
            " float checkpoint of it: mlx-coconut fuse",
        )


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A factor before training: lora_a uniform within 1/sqrt(inputs), lora_b 0, float32.

    Both twins start a seed from the same numbers. Source: mlx_lm's and peft's first values.
    """
    if not name.endswith(".lora_a"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    limit = 1 / math.sqrt(shape[0])
    return rng.uniform(-limit, limit, shape).astype(np.float32)
