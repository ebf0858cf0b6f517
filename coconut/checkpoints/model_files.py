"""The files of a whole model, whatever arrays they are written from: config.json and weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coconut.checkpoints.checkpoint import REMEDY, WEIGHTS, WEIGHTS_INDEX
from coconut.checkpoints.safetensors import safetensors_header
from coconut.errors import UserError

SHARD_BYTES = 5 * 2**30
WRITTEN_OUT = ("num_key_value_heads", "rope_theta", "tie_word_embeddings")
"""Fields of config.json that readers know by different defaults, or in one spelling only."""


def save_config(config: Mapping[str, Any], args: Any, directory: Path) -> None:
    """Write config.json for float32 weights; args: what the architecture made of config."""
    fields = {name: getattr(args, name) for name in WRITTEN_OUT if hasattr(args, name)}
    # Both spellings name the type of the weights; transformers casts to it on loading.
    dtypes = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    text = json.dumps(dict(config) | fields | dtypes, indent=2)
    (directory / "config.json").write_text(text + "\n")


def save_weights(
    weights: Mapping[str, Any], directory: Path, write: Callable[[Path, dict[str, Any]], None]
) -> None:
    """Write model.safetensors, or shards with an index above 5 GB.

    weights: arrays that know their nbytes. write: writes some of them into one file.
    """
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, w in weights.items():
        if size + w.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = w
        size += w.nbytes
    if len(shards) == 1:
        write(directory / WEIGHTS, shards[0])
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(directory / file, shard)
        where.update(dict.fromkeys(shard, file))
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1))


def check_moments(path: Path, fit: bool = True) -> None:
    """Raise UserError unless a file holds moments, which fit the model, and their step."""
    if not path.exists():
        raise UserError(str(path), "missing; this checkpoint cannot be resumed, only started from")
    header = safetensors_header(path)
    step = header.pop("step", None)
    is_step = step is not None and step[:2] == ("I64", (1,))
    if not fit or not is_step or any(entry.dtype != "F32" for entry in header.values()):
        raise UserError(str(path), f"its moments do not fit the model; {REMEDY}")
