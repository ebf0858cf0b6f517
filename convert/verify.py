"""Compare two checkpoints by what they compute: torch on one side, MLX on the other.

    python convert/verify.py SRC DST

Each side goes through its twin's own reading of names and layouts, not through this package's, on
one fixed input with two thoughts. With one framework installed, both sides run there.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as `python convert/verify.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.batch import collate
from coconut.checkpoint import CONFIG
from coconut.cli import guarded
from coconut.curriculum import Row
from coconut.errors import UserError
from convert.keymap import WRAPPER_COPY
from convert.read import Checkpoint, read

TOLERANCE = 1e-4
"""Of the largest logit. Seen between the twins: 1e-6; a turned square matrix gives about 1."""
LONGEST = 64
TWINS = {"torch": "cuda_coconut", "mlx": "mlx_coconut"}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the largest gap between the logits; status 1 if it is too large, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python convert/verify.py",
        description="Compare the logits of two checkpoints, whatever their layouts.",
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--config", type=Path, help="config.json of bare state dicts")
    options = parser.parse_args(argv)

    def run() -> None:
        if not compare(options.source, options.target, options.config):
            sys.exit(1)

    guarded(run)


def compare(source: Path, target: Path, config_path: Path | None = None) -> bool:
    """Whether both compute the same logits to TOLERANCE; prints the largest gap."""
    installed = [name for name in TWINS if importlib.util.find_spec(name)]
    if not installed:
        raise UserError("convert/verify.py", "needs torch or mlx: pip install one of them")
    # A bare state dict does not know its heads; the directory beside it does.
    directory = next((path for path in (source, target) if path.is_dir()), None)
    paths = (source, target)
    found = [read(path, None if path.is_dir() else config_path or directory) for path in paths]
    sides = [installed[0], installed[-1]]
    ours, theirs = (logits(name, c, str(p)) for name, c, p in zip(sides, found, paths, strict=True))
    if ours.shape != theirs.shape:
        raise UserError(str(target), f"{theirs.shape[-1]} rows, but {source} {ours.shape[-1]}")
    gap, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    is_same = gap <= TOLERANCE * largest  # False for NaN
    print(
        f"{'same' if is_same else 'DIFFERENT'}: largest gap {gap:.2e} on logits up to {largest:.3g}"
        f" ({source} in {sides[0]}, {target} in {sides[1]}; {ours.shape[1]} positions, 2 thoughts)"
    )
    return is_same


def logits(framework: str, found: Checkpoint, where: str) -> np.ndarray:
    """Logits (1, T, V) of the fixed input, the twin reading the tensors as they were found."""
    twin = TWINS[framework]
    models, weights, latent = (
        importlib.import_module(f"{twin}.{name}") for name in ("models", "weights", "latent")
    )
    model, module = models.build(found.config, f"{where}/{CONFIG}")
    names = {name: name.removeprefix("base_causallm.") for name in found.foreign}
    raw = {
        names[name]: _array(framework, tensor.float32())
        for name, tensor in found.foreign.items()
        if name != WRAPPER_COPY
    }
    weights.set_weights(model, module.sanitize(raw), where)
    batch = _input(found)
    out = latent.latent_forward(model, latent.Inputs.of(batch), batch.first_latent, batch.n_passes)
    result = model.head(out.hidden)
    return result.detach().numpy() if framework == "torch" else np.array(result)


def _array(framework: str, data: np.ndarray) -> Any:
    if framework == "torch":
        import torch

        return torch.from_numpy(data.copy())
    import mlx.core as mx

    return mx.array(data)


def _input(found: Checkpoint) -> Any:
    """One row of tokens spread over the vocabulary, two latents in its middle."""
    n = found.config.get("n_positions", found.config.get("max_position_embeddings", LONGEST))
    ids = [(13 + 7919 * i) % found.n_rows for i in range(min(n, LONGEST))]
    return collate([Row(0, ids, None, len(ids) // 2, 2)], pad_id=0)


if __name__ == "__main__":
    main()
