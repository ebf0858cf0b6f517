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

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coconut.checkpoints.architectures import TRIED, is_borrowed
from coconut.checkpoints.checkpoint import CHECKSUMS, weight_files
from coconut.config.lora_keys import Lora, lora_of
from coconut.errors import UserError
from coconut.files import read_json, sha256

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
    if config["model_type"] == "gpt2":
        return ("wte",)
    table = "model.embed_tokens" if is_borrowed(config) else "embed_tokens"
    return (table,) if config.get("tie_word_embeddings") else (table, "lm_head")


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
            " remove the key, or train with python -m mlx_coconut.run; of a checkpoint that has it"
            " python -m mlx_coconut.fuse makes a float one",
        )
    if config.get("quantization"):
        raise UserError(
            where,
            "weights quantised by MLX, which torch cannot read; open it with mlx_coconut, or make a"
            " float checkpoint of it: python -m mlx_coconut.fuse",
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


# ---- the files


def fingerprint(directory: Path) -> str:
    """sha256 over a checkpoint's weight files, by the recorded checksums where there are some."""
    known = {}
    if (directory / CHECKSUMS).exists():
        known = read_json(directory / CHECKSUMS).get("files", {})
    digest = hashlib.sha256()
    for name in sorted(weight_files(directory)):
        entry = known.get(name)
        digest.update((entry["sha256"] if entry else sha256(directory / name)).encode())
    return digest.hexdigest()


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter instead of a whole model."""
    return (directory / ADAPTER_CONFIG).exists()


def read_adapter(directory: Path) -> Adapter:
    """What a checkpoint of ours says of its adapter. Raises UserError if it is not one of ours."""
    path = directory / ADAPTER_CONFIG
    ours = read_json(path).get("coconut")
    if not isinstance(ours, dict):
        raise UserError(
            str(path),
            "an adapter of another program; python -m coconut.convert.adapters makes it one of ours",
        )
    try:
        return Adapter(
            lora=lora_of(ours["lora"]),
            rows=tuple(int(row) for row in ours["rows"]),
            base=str(ours["base"]),
            base_sha256=str(ours["base_sha256"]),
            new_tokens=range(*ours["new_tokens"]),
            directory=directory,
            revision=ours.get("revision"),
            seed=int(ours.get("seed", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"damaged: {error}") from None


def adapter_config(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json: what mlx_lm reads, and under `coconut` what we read."""
    lora = adapter.lora
    rows = [mlx_name(path) for path in vocabulary(config)] if adapter.rows else []
    return {
        "fine_tune_type": lora.type,
        "model": adapter.base,
        "num_layers": lora.layers or n_layers(config),
        "lora_parameters": {
            "rank": _rank_in_file(adapter),
            "scale": lora.scale,
            "dropout": lora.dropout,
            "keys": [*targets(config, lora), *rows],
        },
        "coconut": {
            "lora": dataclasses.asdict(lora),
            "rows": list(adapter.rows),
            "new_tokens": [adapter.new_tokens.start, adapter.new_tokens.stop],
            "base": adapter.base,
            "revision": adapter.revision,
            "seed": adapter.seed,
            "base_sha256": adapter.base_sha256,
        },
    }


def split_trained(trained: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the factors, what is trained whole) of all trained arrays."""
    factors = {n: w for n, w in trained.items() if n.rsplit(".", 1)[-1] in LEAVES}
    return factors, {n: w for n, w in trained.items() if n not in factors}


def to_mlx_lm(
    adapter: Adapter, trained: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """adapters.safetensors: names and shapes as mlx_lm loads them.

    base: the frozen matrix (V, width) of each path with trained rows. mlx_lm knows no trained rows,
    so a row's change is written as factors of the embedding: a column that is 1 / scale at its
    token, and the change. Ranks below the number of rows are filled up with zeros.
    """
    rank, lora = _rank_in_file(adapter), adapter.lora
    factors, whole = split_trained(trained)
    out = {}
    for name, w in factors.items():
        axis = {"lora_a": 1, "lora_b": 0}.get(name.rsplit(".", 1)[-1])
        if axis is not None and lora.rank < rank:
            fill = [(0, 0), (0, 0)]
            fill[axis] = (0, rank - lora.rank)
            w = np.pad(w, fill)
        out[mlx_name(name)] = w
    for path, matrix in base.items():
        rows, tokens = whole[f"{path}.rows"], list(adapter.rows)
        chosen = np.zeros((len(matrix), rank), np.float32)
        chosen[tokens, range(len(tokens))] = 1 / lora.scale
        change = np.zeros((rank, matrix.shape[1]), np.float32)
        change[: len(tokens)] = rows - matrix[tokens]
        is_head = path == "lm_head"
        out[f"{mlx_name(path)}.lora_a"] = change.T if is_head else chosen
        out[f"{mlx_name(path)}.lora_b"] = chosen.T if is_head else change
        if lora.type == "dora":
            lengths = np.linalg.norm(matrix, axis=1)
            lengths[tokens] = np.linalg.norm(rows, axis=1)
            out[f"{mlx_name(path)}.m"] = lengths.astype(np.float32)
    return out


def from_mlx_lm(
    adapter: Adapter, config: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, Any]:
    """The factors of `to_mlx_lm`'s arrays; the rows are in trained.safetensors, exactly."""
    factors = {}
    for name, w in arrays.items():
        name = own_name(config, name)
        path, leaf = name.rsplit(".", 1)
        if path in vocabulary(config):
            continue
        if leaf == "lora_a":
            w = w[:, : adapter.lora.rank]
        elif leaf == "lora_b":
            w = w[: adapter.lora.rank]
        factors[name] = w
    return factors


def check_arrays(
    arrays: Mapping[str, Sequence[int]], config: Mapping[str, Any], adapter: Adapter
) -> None:
    """Raise UserError unless arrays (name to shape) are those the adapter's settings call for."""
    expected = trained_shapes(config, adapter.lora, len(adapter.rows))
    problems = [f"{name}: missing" for name in expected if name not in arrays]
    problems += [f"{name}: not part of this adapter" for name in arrays if name not in expected]
    problems += [
        f"{name}: shape {tuple(shape)}, expected {expected[name]}"
        for name, shape in arrays.items()
        if name in expected and tuple(shape) != expected[name]
    ]
    if problems:
        raise UserError(str(adapter.directory), *problems[:5])


def _rank_in_file(adapter: Adapter) -> int:
    return max(adapter.lora.rank, len(adapter.rows))


def own_name(config: Mapping[str, Any], name: str) -> str:
    """Our name of an array that mlx_lm calls by this one."""
    return name if is_borrowed(config) else name.removeprefix("model.")


def mlx_name(name: str) -> str:
    """mlx_lm keeps all but the head under `model`, and so do borrowed models."""
    return name if name.startswith(("lm_head", "model.")) else f"model.{name}"
