"""Checkpoint directories in and out: config.json, weights in Hugging Face layout, moments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from coconut.checkpoints.checkpoint import FEEDBACK, OPTIMIZER, describe, weight_files
from coconut.checkpoints.model_files import check_moments
from coconut.checkpoints.safetensors import read_safetensors, safetensors_header
from coconut.checkpoints.verdict import NOT_FINITE, check_fits, without_constants
from coconut.errors import UserError, some
from coconut.feedback.weights import RULE_PREFIX
from coconut.files import library_writes
from mlx_coconut import models

HEAD, TABLES = "lm_head.weight", ("wte.weight", "embed_tokens.weight")


def load_model(directory: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, its architecture's module, config) of a checkpoint directory, weights as float32.

    Every parameter is set exactly once with its own shape, or UserError lists what does not fit.
    """
    config = describe(directory)["config"]
    model, module = models.build(config, str(directory / "config.json"))
    raw: dict[str, mx.array] = {}
    for name in weight_files(directory):
        raw.update(read_tensors(directory / name))
    own = module.sanitize(without_constants(config, raw, to_numpy, str(directory)))
    if config.get("quantization"):
        _quantize_as(model, config["quantization"], own, str(directory / "config.json"))
    set_weights(model, own, str(directory))
    return model, module, config


def check_finite(weights: Mapping[str, mx.array], where: str) -> None:
    """Raise UserError naming the tensors that hold NaN or infinity."""
    # One reduction a tensor: a sum is finite where all of it is, if it is not too large.
    sums = {name: w.sum() for name, w in weights.items() if mx.issubdtype(w.dtype, mx.floating)}
    mx.eval(sums)
    odd = [n for n, s in sums.items() if not mx.isfinite(s).item()]
    odd = [n for n in odd if not mx.isfinite(weights[n]).all().item()]
    if odd:
        raise UserError(where, *some(f"{name}: {NOT_FINITE}" for name in odd))


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
        if not any(mx.array_equal(head, w) for n, w in weights.items() if n.endswith(TABLES)):
            raise UserError(
                where,
                f"{HEAD}: differs from the embedding that config.json ties it to; set"
                " tie_word_embeddings to false there",
            )
    check_fits({name: w.shape for name, w in weights.items()}, shapes, where)
    own = {
        name: w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
        for name, w in weights.items()
    }
    check_finite(own, where)
    model.update(tree_unflatten(list(own.items())))
    mx.eval(model.parameters())
    if hasattr(model, "check"):  # a borrowed model, held against its library's own forward
        model.check(where)


def hf_weights(model, module) -> dict[str, mx.array]:
    """The model's parameters under Hugging Face names, in Hugging Face layout."""
    own = dict(tree_flatten(model.parameters()))
    return module.to_hf({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})


def trained_weights(model) -> dict[str, mx.array]:
    """The parameters that an update changes, under their own names."""
    return dict(tree_flatten(model.trainable_parameters()))


def take_weights(model, other) -> None:
    """Give a model the weights of another one of its shape; its feedback rule keeps its own."""
    # As updates leave them: products with turned arrays may differ in the last bit.
    model.update(tree_map(mx.contiguous, other.parameters()))


def feedback_weights(model) -> dict[str, mx.array]:
    """The weights of the model's feedback rule, without prefix."""
    own = dict(tree_flatten(model.parameters()))
    return {n.removeprefix(RULE_PREFIX): w for n, w in own.items() if n.startswith(RULE_PREFIX)}


def save_feedback(model, directory: Path) -> None:
    """Write feedback.safetensors if the model's rule has weights."""
    if own := feedback_weights(model):
        write_tensors(directory / FEEDBACK, {f"{RULE_PREFIX}{n}": w for n, w in own.items()})


def load_feedback(directory: Path) -> dict[str, mx.array]:
    """The weights in feedback.safetensors without prefix; none if there is no such file."""
    path = directory / FEEDBACK
    raw = read_tensors(path) if path.exists() else {}
    check_finite(raw, str(path))
    return {n.removeprefix(RULE_PREFIX): w for n, w in raw.items()}


def save_moments(optimizer, module, directory: Path | None) -> None:
    """Write AdamW's moments as m.NAME and v.NAME under Hugging Face names, and the step count.

    directory: None in all processes but the first, which hold nothing alone here.
    """
    if directory is None:
        return
    state = dict(tree_flatten(optimizer.state))
    moments = {}
    for kind in ("m", "v"):
        own = {n[: -len(kind) - 1]: w for n, w in state.items() if n.endswith(f".{kind}")}
        rule = {n: own.pop(n) for n in list(own) if n.startswith(RULE_PREFIX)}
        named = module.to_hf(own) | rule
        moments.update({f"{kind}.{n}": w for n, w in named.items()})
    moments["step"] = mx.array([int(optimizer.step)], mx.int64)
    write_tensors(directory / OPTIMIZER, moments)


def load_moments(optimizer, model, module, directory: Path) -> None:
    """Read what `save_moments` of either twin wrote. Raises UserError on anything missing."""
    path = directory / OPTIMIZER
    check_moments(path)
    raw = read_tensors(path)
    step = raw.pop("step")
    optimizer.init(model.trainable_parameters())
    flat = dict(tree_flatten(optimizer.state))
    for kind in ("m", "v"):
        named = {n[2:]: w for n, w in raw.items() if n.startswith(f"{kind}.")}
        rule = {n: named.pop(n) for n in list(named) if n.startswith(RULE_PREFIX)}
        own = module.sanitize(named) | rule
        shapes = {n: w.shape for n, w in flat.items() if n.endswith(f".{kind}")}
        check_moments(path, {f"{n}.{kind}": w.shape for n, w in own.items()} == shapes)
        flat.update({f"{n}.{kind}": w for n, w in own.items()})
    flat["step"] = mx.array(int(step.item()), mx.uint64)
    optimizer.state = tree_unflatten(list(flat.items()))
    mx.eval(optimizer.state)


def write_tensors(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file that other programs open."""
    # transformers refuses files that do not say which framework's layout they hold.
    contiguous = {name: mx.contiguous(w) for name, w in arrays.items()}
    mx.eval(contiguous)  # so that what is raised below is of the disk
    with library_writes(path, RuntimeError):
        mx.save_safetensors(str(path), contiguous, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file. Raises UserError if it is damaged."""
    if any(entry.dtype == "F64" for entry in safetensors_header(path).values()):
        # twin: torch reads float64 itself.
        return {name: mx.array(t.float32()) for name, t in read_safetensors(path).items()}
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise UserError(str(path), f"cannot be read: {error}") from None


def to_numpy(weights: dict[str, mx.array]) -> dict[str, np.ndarray]:
    """float32 numpy copies."""
    return {name: np.array(w.astype(mx.float32)) for name, w in weights.items()}


def from_numpy(weights: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    """The same in MLX."""
    return {name: mx.array(w) for name, w in weights.items()}
