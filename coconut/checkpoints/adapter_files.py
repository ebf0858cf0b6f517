"""An adapter's files: reading, describing and checking them, and mlx_lm's names."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coconut.checkpoints.adapters import (
    ADAPTER_CONFIG,
    LEAVES,
    Adapter,
    n_layers,
    targets,
    trained_shapes,
    vocabulary,
)
from coconut.checkpoints.architectures import is_borrowed
from coconut.checkpoints.checkpoint import CHECKSUMS, weight_files
from coconut.config.lora_keys import lora_of
from coconut.errors import UserError
from coconut.files import read_json, sha256


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
            "an adapter of another program; mlx-coconut convert --adapter makes it ours",
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
