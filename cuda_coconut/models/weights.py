"""Checkpoint directories in and out: config.json, weights in Hugging Face layout, moments."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coconut.checkpoints.adapters import check_twin
from coconut.checkpoints.checkpoint import FEEDBACK, OPTIMIZER, describe, weight_files
from coconut.checkpoints.model_files import check_moments
from coconut.checkpoints.safetensors import safetensors_header
from coconut.checkpoints.verdict import NOT_FINITE, check_fits, without_constants
from coconut.errors import UserError, some
from coconut.feedback.weights import RULE_PREFIX
from coconut.files import library_writes
from cuda_coconut import models
from cuda_coconut.models.shard import spread_like, whole

HEAD, TABLES = "lm_head.weight", ("wte.weight", "embed_tokens.weight")
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""Names in the file -> names in the state of torch's AdamW."""


def load_model(directory: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, its architecture's module, config) of a checkpoint directory, weights as float32.

    Every parameter is set exactly once with its own shape, or UserError lists what does not fit.
    """
    config = describe(directory)["config"]
    check_twin("cuda_coconut", None, config, str(directory))
    model, module = models.build(config, str(directory / "config.json"))
    raw: dict[str, torch.Tensor] = {}
    for name in weight_files(directory):
        raw.update(read_tensors(directory / name))
    raw = without_constants(config, raw, to_numpy, str(directory))
    set_weights(model, module.sanitize(raw), str(directory))
    return model, module, config


def check_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise UserError naming the tensors that hold NaN or infinity."""
    # One reduction a tensor: a sum is finite where all of it is, if it is not too large.
    odd = [n for n, w in weights.items() if not w.sum().isfinite() and not w.isfinite().all()]
    if odd:
        raise UserError(where, *some(f"{name}: {NOT_FINITE}" for name in odd))


def set_weights(model, weights: dict[str, torch.Tensor], where: str) -> None:
    """Put weights into a model, strictly; floating types become float32.

    A tied head may be there once more, equal to the embedding.
    """
    shapes = {name: w.shape for name, w in model.named_parameters()}
    if HEAD in weights and HEAD not in shapes:
        weights = dict(weights)
        head = weights.pop(HEAD)
        if not any(torch.equal(head, w) for n, w in weights.items() if n.endswith(TABLES)):
            raise UserError(
                where,
                f"{HEAD}: differs from the embedding that config.json ties it to; set"
                " tie_word_embeddings to false there",
            )
    check_fits({name: w.shape for name, w in weights.items()}, shapes, where)
    # Copies: the file's tensors are views into it, turned ones are not contiguous.
    own = {k: w.float().clone(memory_format=torch.contiguous_format) for k, w in weights.items()}
    check_finite(own, where)
    model.load_state_dict(own, assign=True)
    if hasattr(model, "check"):  # a borrowed model, held against its library's own forward
        model.check(where)


def hf_weights(model, module) -> dict[str, torch.Tensor]:
    """The model's parameters under Hugging Face names, in Hugging Face layout."""
    own = {name: w.detach() for name, w in model.named_parameters()}
    return module.to_hf({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})


def trained_weights(model) -> dict[str, torch.Tensor]:
    """The parameters that an update changes, under their own names."""
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def take_weights(model, other) -> None:
    """Give a model the weights of another one of its shape; its feedback rule keeps its own."""
    rule = {n: w for n, w in model.state_dict().items() if n.startswith(RULE_PREFIX)}
    model.load_state_dict(other.state_dict() | rule)


def feedback_weights(model) -> dict[str, torch.Tensor]:
    """The weights of the model's feedback rule, without prefix."""
    own = {name: w.detach() for name, w in model.named_parameters()}
    return {n.removeprefix(RULE_PREFIX): w for n, w in own.items() if n.startswith(RULE_PREFIX)}


def save_feedback(model, directory: Path) -> None:
    """Write feedback.safetensors if the model's rule has weights."""
    if own := feedback_weights(model):
        write_tensors(directory / FEEDBACK, {f"{RULE_PREFIX}{n}": w for n, w in own.items()})


def load_feedback(directory: Path) -> dict[str, torch.Tensor]:
    """The weights in feedback.safetensors without prefix; none if there is no such file."""
    path = directory / FEEDBACK
    raw = read_tensors(path) if path.exists() else {}
    check_finite(raw, str(path))
    return {n.removeprefix(RULE_PREFIX): w for n, w in raw.items()}


def save_moments(optimizer, module, directory: Path | None) -> None:
    """Write AdamW's moments as m.NAME and v.NAME under Hugging Face names, and the step count.

    directory: None hands over this process's part of them; see `Backend.save`.
    """
    groups = optimizer.param_groups
    named = [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]
    moments, step = {}, 0
    for kind, key in MOMENTS.items():
        own = {}
        for name, w in named:
            # Before the first update torch has no state yet.
            state = optimizer.state.get(w) or {key: torch.zeros_like(w), "step": 0}
            moment, step = whole(state[key]), state["step"]
            if directory is not None:
                own[name] = moment.cpu()
        if directory is None:
            continue
        rule = {n: own.pop(n) for n in list(own) if n.startswith(RULE_PREFIX)}
        own = module.to_hf(own) | rule
        moments.update({f"{kind}.{n}": w.detach() for n, w in own.items()})
    if directory is None:
        return
    moments["step"] = torch.tensor([int(step)])
    write_tensors(directory / OPTIMIZER, moments)


def load_moments(optimizer, model, module, directory: Path) -> None:
    """Read what `save_moments` of either twin wrote. Raises UserError on anything missing."""
    path = directory / OPTIMIZER
    check_moments(path)
    raw = read_tensors(path)
    step = raw.pop("step")
    trained = trained_weights(model)
    shapes = {name: w.shape for name, w in trained.items()}
    own = {}
    for kind in MOMENTS:
        read = {n[2:]: w for n, w in raw.items() if n.startswith(f"{kind}.")}
        rule = {n: read.pop(n) for n in list(read) if n.startswith(RULE_PREFIX)}
        own[kind] = module.sanitize(read) | rule
    check_moments(path, all({n: w.shape for n, w in o.items()} == shapes for o in own.values()))
    for name, p in trained.items():
        # The fused AdamW wants its step count as a float32 beside the parameter.
        state = {"step": torch.tensor(float(step.item()), device=p.device)}
        for kind, key in MOMENTS.items():
            # A copy: the file's tensors are views into it, turned ones are not contiguous.
            moment = own[kind][name].to(p.dtype).clone(memory_format=torch.contiguous_format)
            state[key] = spread_like(moment, p)
        optimizer.state[p] = state


def write_tensors(path: Path, arrays: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that other programs open."""
    # transformers refuses files that do not say which framework's layout they hold.
    contiguous = {name: w.contiguous() for name, w in arrays.items()}
    with library_writes(path, SafetensorError):
        save_file(contiguous, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a safetensors file. Raises UserError if it is damaged."""
    safetensors_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(str(path), f"cannot be read: {error}") from None


def to_numpy(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """float32 numpy copies."""
    # Copied before: FSDP cannot free what numpy looks into.
    return {name: w.float().cpu().clone().numpy() for name, w in weights.items()}


def from_numpy(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same in torch."""
    return {name: torch.from_numpy(w) for name, w in weights.items()}
