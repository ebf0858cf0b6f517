"""Checkpoint directories in and out: config.json, weights in Hugging Face layout, moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from coconut.checkpoints.adapters import check_twin
from coconut.checkpoints.checkpoint import FEEDBACK, OPTIMIZER, WEIGHTS, WEIGHTS_INDEX, weight_files
from coconut.errors import UserError
from cuda_coconut import models
from cuda_coconut.models.base import RULE_PREFIX
from cuda_coconut.models.shard import spread_like, whole

SHARD_BYTES = 5 * 2**30
HEAD = "lm_head.weight"
WRITTEN_OUT = ("num_key_value_heads", "rope_theta", "tie_word_embeddings")
"""Fields of config.json that readers know by different defaults, or in one spelling only."""
MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
"""Names in the file -> names in the state of torch's AdamW."""


def load_model(directory: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, its architecture's module, config) of a checkpoint directory, weights as float32.

    Every parameter is set exactly once with its own shape, or UserError lists what does not fit.
    """
    config = json.loads((directory / "config.json").read_text())
    check_twin("cuda_coconut", None, config, str(directory))
    model, module = models.build(config, str(directory / "config.json"))
    raw: dict[str, torch.Tensor] = {}
    for name in weight_files(directory):
        raw.update(load_file(directory / name))
    set_weights(model, module.sanitize(raw), str(directory))
    return model, module, config


def set_weights(model, weights: dict[str, torch.Tensor], where: str) -> None:
    """Put weights into a model, strictly; floating types become float32.

    A tied head may be there once more, equal to the embedding.
    """
    shapes = {name: w.shape for name, w in model.named_parameters()}
    if HEAD in weights and HEAD not in shapes:
        weights = dict(weights)
        head = weights.pop(HEAD)
        if not any(torch.equal(head, w) for w in weights.values()):
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
    # Copies: the file's tensors are views into it, turned ones are not contiguous.
    own = {k: w.float().clone(memory_format=torch.contiguous_format) for k, w in weights.items()}
    model.load_state_dict(own, assign=True)
    if hasattr(model, "check"):  # a borrowed model, held against its library's own forward
        model.check(where)


def hf_weights(model, module) -> dict[str, torch.Tensor]:
    """The model's parameters under Hugging Face names, in Hugging Face layout."""
    own = {name: w.detach() for name, w in model.named_parameters()}
    return module.to_hf({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})


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
    raw = load_file(path) if path.exists() else {}
    return {n.removeprefix(RULE_PREFIX): w for n, w in raw.items()}


def save_config(config: dict[str, Any], args: Any, directory: Path) -> None:
    """Write config.json for float32 weights; args: what the architecture made of config."""
    fields = {name: getattr(args, name) for name in WRITTEN_OUT if hasattr(args, name)}
    # Both spellings name the type of the weights; transformers casts to it on loading.
    dtypes = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    text = json.dumps(config | fields | dtypes, indent=2)
    (directory / "config.json").write_text(text + "\n")


def save_weights(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Write model.safetensors, or shards with an index above 5 GB."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, w in weights.items():
        if size + w.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = w
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
    if not path.exists():
        raise UserError(str(path), "missing; this checkpoint cannot be resumed, only started from")
    raw = load_file(path)
    step = raw.pop("step", None)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    shapes = {name: w.shape for name, w in trained.items()}
    own = {}
    for kind in MOMENTS:
        read = {n[2:]: w for n, w in raw.items() if n.startswith(f"{kind}.")}
        rule = {n: read.pop(n) for n in list(read) if n.startswith(RULE_PREFIX)}
        own[kind] = module.sanitize(read) | rule
    if step is None or any({n: w.shape for n, w in o.items()} != shapes for o in own.values()):
        raise UserError(str(path), "its moments do not fit the model; remove it to start anew")
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
    save_file(contiguous, path, metadata={"format": "pt"})


def to_numpy(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """float32 numpy copies."""
    # Copied before: FSDP cannot free what numpy looks into.
    return {name: w.float().cpu().clone().numpy() for name, w in weights.items()}
