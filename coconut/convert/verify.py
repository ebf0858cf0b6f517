"""Compare two checkpoints by what they compute: torch on one side, MLX on the other.

    mlx-coconut convert --verify SRC DST

Each side goes through its twin's own reading of names and layouts, not through this package's, on
one fixed input with two thoughts, made by the checkpoint's own feedback rule. With one framework
installed, both sides run there.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coconut.batches.batch import collate
from coconut.batches.curriculum import Row
from coconut.checkpoints.architectures import COCONUT_PREFIX, WRAPPER_COPY, n_positions
from coconut.checkpoints.checkpoint import CONFIG
from coconut.checkpoints.model_args import FORK_IDS
from coconut.config.methods import WITH_FEEDBACK
from coconut.convert.keymap import TWINS
from coconut.convert.read import Checkpoint, read
from coconut.errors import UserError
from coconut.feedback.attached import prepare
from coconut.feedback.rules import parse
from coconut.feedback.weights import Setup

TOLERANCE = 1e-4
"""Of the largest logit. Seen between the twins: 1e-6; a turned square matrix gives about 1."""
LONGEST = 64


class Fed(NamedTuple):
    """What latents receive: a feedback rule, and the directory that holds its weights."""

    setup: Setup
    directory: Path | None = None


PUBLISHED = Fed(Setup(parse("last"), (0, 0, 0), 0, 0))
"""Where neither side names a rule."""


def compare(source: Path, target: Path, config_path: Path | None = None) -> bool:
    """Whether both compute the same logits to TOLERANCE; prints the largest gap."""
    installed = [name for name in TWINS if importlib.util.find_spec(name)]
    if not installed:
        raise UserError("coconut.convert.verify", "needs torch or mlx: pip install one of them")
    # A bare state dict does not know its heads; the directory beside it does.
    directory = next((path for path in (source, target) if path.is_dir()), None)
    paths = (source, target)
    found = [read(path, None if path.is_dir() else config_path or directory) for path in paths]
    sides = [installed[0], installed[-1]]
    said = [fed(c) for c in found]
    # A state dict does not name its rule, nor hold the rule's weights: the other side does.
    feds = [said[0] or said[1] or PUBLISHED, said[1] or said[0] or PUBLISHED]
    ours, theirs = (logits(*side) for side in zip(sides, found, map(str, paths), feds, strict=True))
    if ours.shape != theirs.shape:
        raise UserError(str(target), f"{theirs.shape[-1]} rows, but {source} {ours.shape[-1]}")
    gap, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    is_same = gap <= TOLERANCE * largest  # False for NaN
    print(
        f"{'same' if is_same else 'DIFFERENT'}: largest gap {gap:.2e} on logits up to {largest:.3g}"
        f" ({source} in {sides[0]}, {target} in {sides[1]}; {ours.shape[1]} positions,"
        f" 2 thoughts by {' and '.join(dict.fromkeys(str(fed.setup.rule) for fed in feds))})"
    )
    return is_same


def fed(found: Checkpoint) -> Fed | None:
    """What a checkpoint says its latents receive; None if it does not say."""
    ids = [found.config.get(name, 0) for name in FORK_IDS]
    if found.coconut is not None:
        ids = found.coconut.get("latent_ids") or ids
        is_fed = found.coconut.get("method", "coconut") in WITH_FEEDBACK
        rule = found.coconut.get("feedback") or "last" if is_fed else "token"
    elif "replacement_method" in found.config:
        rule = str(found.config["replacement_method"])
    else:
        return None
    eos = found.config.get("eos_token_id")
    eos_id = eos if type(eos) is int else 0
    start, end, latent = ids
    try:
        setup = Setup(parse(rule), (start, end, latent), eos_id, found.n_rows)
    except ValueError as error:
        raise UserError(str(found.directory), f"feedback {rule}: {error}") from None
    return Fed(setup, None if found.coconut is None else found.directory)


def logits(framework: str, found: Checkpoint, where: str, fed: Fed) -> np.ndarray:
    """Logits (2, T, V) of the fixed input, the twin reading the tensors as they were found."""
    twin = TWINS[framework]
    models, weights, latent, feedback = (
        importlib.import_module(f"{twin}.{name}")
        for name in ("models", "models.weights", "thoughts.latent", "thoughts.feedback")
    )
    model, module = models.build(found.config, f"{where}/{CONFIG}")
    arch = found.architecture
    raw = {
        name.removeprefix(COCONUT_PREFIX): _array(framework, tensor.float32())
        for name, tensor in found.foreign.items()
        if name != WRAPPER_COPY and not arch.buffers.fullmatch(arch.hub_name(name))
    }
    weights.set_weights(model, module.sanitize(raw), where)
    trained = weights.load_feedback(fed.directory) if fed.directory else {}
    feedback.attach(model, fed.setup, trained=trained)
    batch = _input(found)
    prepared = prepare(model, batch, (0,))
    plan = (batch.first_latent, batch.n_passes * (not fed.setup.rule.is_token))
    out = latent.latent_forward(model, latent.Inputs.of(batch), *plan, prepared=prepared)
    result = model.head(out.hidden)
    return result.detach().numpy() if framework == "torch" else np.array(result)


def _array(framework: str, data: np.ndarray) -> Any:
    if framework == "torch":
        import torch

        return torch.from_numpy(data.copy())
    import mlx.core as mx

    return mx.array(data)


def _input(found: Checkpoint) -> Any:
    """Two rows of tokens spread over the vocabulary, two latents in the middle of each."""
    n = n_positions(found.config) or LONGEST
    length = min(n, LONGEST)
    ids = [(13 + 7919 * i) % found.n_rows for i in range(2 * length)]
    rows = (ids[:length], ids[length:])
    return collate([Row(i, row, None, length // 2, 2) for i, row in enumerate(rows)], pad_id=0)
