"""Checkpoint directories in and out: config.json, weights in Hugging Face layout, moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from coconut.checkpoints.checkpoint import FEEDBACK, OPTIMIZER, WEIGHTS, WEIGHTS_INDEX, weight_files
from coconut.errors import UserError
from mlx_coconut import models
from mlx_coconut.models.base import RULE_PREFIX

SHARD_BYTES = 5 * 2**30
HEAD = "lm_head.weight"
WRITTEN_OUT = ("num_key_value_heads", "rope_theta", "tie_word_embeddings")
"""Fields of config.json that readers know by different defaults, or in one spelling only."""


def load_model(directory: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, its architecture's module, config) of a checkpoint directory, weights as float32.

    Every parameter is set exactly once with its own shape, or UserError lists what does not fit.
    """
    config = json.loads((directory / "config.json").read_text())
    model, module = models.build(config, str(directory / "config.json"))
    raw: dict[str, mx.array] = {}
    for name in weight_files(directory):
        raw.update(mx.load(str(directory / name)))
    own = module.sanitize(raw)
    if config.get("quantization"):
        _quantize_as(model, config["quantization"], own, str(directory / "config.json"))
    set_weights(model, own, str(directory))
    return model, module, config


def _quantize_as(model, quantization: dict[str, Any], own: dict[str, mx.array], where: str) -> None:
    """Give the model the quantised layers that a directory of mlx_lm's has scales for."""

    def settings(path: str, module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in own:
            return False
        # A layer of its own settings is listed under its name, mlx_lm's or the hub's.
        return quantization.get(path) or quantization.get(f"model.{path}") or True

    try:
        nn.quantize(
            model,
            quantization["group_size"],
            quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=settings,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(where, f"quantization cannot be read: {error}") from None


def set_weights(model, weights: dict[str, mx.array], where: str) -> None:
    """Put weights into a model, strictly; floating types become float32.

    Quantised ones stay as they are. A tied head may be there once more, equal to the embedding.
    """
    shapes = {name: w.shape for name, w in tree_flatten(model.parameters())}
    if HEAD in weights and HEAD not in shapes:
        weights = dict(weights)
        head = weights.pop(HEAD)
        if not any(mx.array_equal(head, w) for w in weights.values()):
            raise UserError(
                where,
                f"{HEAD}: differs from the embedding that config.json ties it to; set"
                " tie_word_embeddings to false there",
            )
    problems = [f"{name}: missing" for name in shapes if name not in weights]
    problems += [f"{name}: not a tensor of this model" for name in weights if name not in shapes]
    problems += [
        f"{name}: shape {tuple(w.shape)}, expected {tuple(shapes[name])}"
        for name, w in weights.items()
        if name in shapes and w.shape != shapes[name]
    ]
    if problems:
        raise UserError(where, *problems)
    own = {
        name: w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        for name, w in weights.items()
    }
    model.update(tree_unflatten(list(own.items())))
    mx.eval(model.parameters())
    if hasattr(model, "check"):  # a borrowed model, held against its library's own forward
        model.check(where)


def hf_weights(model, module) -> dict[str, mx.array]:
    """The model's parameters under Hugging Face names, in Hugging Face layout."""
    own = dict(tree_flatten(model.parameters()))
    return module.to_hf({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})


def feedback_weights(model) -> dict[str, mx.array]:
    """The weights of the model's feedback rule, without prefix."""
    own = dict(tree_flatten(model.parameters()))
    return {n.removeprefix(RULE_PREFIX): w for n, w in own.items() if n.startswith(RULE_PREFIX)}


def save_feedback(model, directory: Path) -> None:
    """Write feedback.safetensors if the model's rule has weights."""
    if own := feedback_weights(model):
        write_tensors(
            directory / FEEDBACK,
            {f"{RULE_PREFIX}{n}": mx.contiguous(w) for n, w in own.items()},
        )


def load_feedback(directory: Path) -> dict[str, mx.array]:
    """The weights in feedback.safetensors without prefix; none if there is no such file."""
    path = directory / FEEDBACK
    raw = mx.load(str(path)) if path.exists() else {}
    return {n.removeprefix(RULE_PREFIX): w for n, w in raw.items()}


def save_config(config: dict[str, Any], args: Any, directory: Path) -> None:
    """Write config.json for float32 weights; args: what the architecture made of config."""
    fields = {name: getattr(args, name) for name in WRITTEN_OUT if hasattr(args, name)}
    # Both spellings name the type of the weights; transformers casts to it on loading.
    dtypes = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    text = json.dumps(config | fields | dtypes, indent=2)
    (directory / "config.json").write_text(text + "\n")


def save_weights(weights: dict[str, mx.array], directory: Path) -> None:
    """Write model.safetensors, or shards with an index above 5 GB."""
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, w in weights.items():
        if size + w.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = mx.contiguous(w)
        size += w.nbytes
    if len(shards) == 1:
        write_tensors(directory / WEIGHTS, shards[0])
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        where.update(dict.fromkeys(shard, file))
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1))


def save_moments(optimizer, module, directory: Path) -> None:
    """Write AdamW's moments as m.NAME and v.NAME under Hugging Face names, and the step count."""
    state = dict(tree_flatten(optimizer.state))
    moments = {}
    for kind in ("m", "v"):
        own = {n[: -len(kind) - 1]: w for n, w in state.items() if n.endswith(f".{kind}")}
        rule = {n: own.pop(n) for n in list(own) if n.startswith(RULE_PREFIX)}
        named = module.to_hf(own) | rule
        moments.update({f"{kind}.{n}": mx.contiguous(w) for n, w in named.items()})
    moments["step"] = mx.array([int(optimizer.step)], mx.int64)
    write_tensors(directory / OPTIMIZER, moments)


def load_moments(optimizer, model, module, directory: Path) -> None:
    """Read what `save_moments` of either twin wrote. Raises UserError on anything missing."""
    path = directory / OPTIMIZER
    if not path.exists():
        raise UserError(str(path), "missing; this checkpoint cannot be resumed, only started from")
    raw = mx.load(str(path))
    step = raw.pop("step", None)
    optimizer.init(model.trainable_parameters())
    flat = dict(tree_flatten(optimizer.state))
    for kind in ("m", "v"):
        named = {n[2:]: w for n, w in raw.items() if n.startswith(f"{kind}.")}
        rule = {n: named.pop(n) for n in list(named) if n.startswith(RULE_PREFIX)}
        own = module.sanitize(named) | rule
        shapes = {n: w.shape for n, w in flat.items() if n.endswith(f".{kind}")}
        if step is None or {f"{n}.{kind}": w.shape for n, w in own.items()} != shapes:
            raise UserError(str(path), "its moments do not fit the model; remove it to start anew")
        flat.update({f"{n}.{kind}": w for n, w in own.items()})
    flat["step"] = mx.array(int(step.item()), mx.uint64)
    optimizer.state = tree_unflatten(list(flat.items()))
    mx.eval(optimizer.state)


def write_tensors(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file that other programs open."""
    # transformers refuses files that do not say which framework's layout they hold.
    mx.save_safetensors(str(path), arrays, metadata={"format": "pt"})


def to_numpy(weights: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """float32 numpy copies."""
    return {name: np.array(w.astype(mx.float32)) for name, w in weights.items()}
