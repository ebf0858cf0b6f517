"""Initial weights, drawn on the host: both twins start a seed from the same numbers."""

import math
import zlib
from typing import Any

import numpy as np

from coconut.checkpoints.architectures import GEMMAS

RESIDUAL_OUT = ("attn.c_proj.weight", "mlp.c_proj.weight")
"""GPT-2's projections into the residual stream, scaled down by sqrt(2 L) as published."""


def initial_weights(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """float32 weights for Hugging Face names and shapes.

    Matrices are normal with config's initializer_range, biases 0, norm weights 1 (Gemma: 0);
    GPT-2's positions are sinusoids if config's position_initializer (a field of ours) says so.
    Every tensor has a stream of its own, made from its name and the seed.
    """
    std = config.get("initializer_range", 0.02)
    n_layers = config.get("n_layer") or config.get("num_hidden_layers") or 1
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("bias"):
            w = np.zeros(shape)
        elif len(shape) == 1:
            # Gemma's norms multiply by 1 + their weight.
            w = np.zeros(shape) if config.get("model_type") in GEMMAS else np.ones(shape)
        elif name == "wpe.weight" and config.get("position_initializer") == "sinusoid":
            w = _sinusoids(*shape) * std * math.sqrt(2)
        else:
            scale = std / math.sqrt(2 * n_layers) if name.endswith(RESIDUAL_OUT) else std
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            w = rng.standard_normal(shape) * scale
        weights[name] = w.astype(np.float32)
    return weights


def _sinusoids(n: int, width: int) -> np.ndarray:
    """(n, width) sines and cosines of the position at wavelengths from 2 pi to 2000 pi.

    A small model learns to look a fixed distance back sooner than from random rows.
    """
    angles = np.arange(n)[:, None] * 1000.0 ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n, width)


def grown_rows(
    old: np.ndarray, n_rows: int, copy_from: int | None, new: range, seed: int
) -> np.ndarray:
    """An embedding matrix with n_rows rows; the rows of `new` set as published.

    old (V, D) float32. copy_from: the row that the new tokens start from (`<<`); None draws them
    at the spread of the old rows, for vocabularies without that token. Never shrinks.
    """
    rows = np.zeros((max(n_rows, len(old)), old.shape[1]), np.float32)
    rows[: len(old)] = old
    rng = np.random.default_rng([seed, zlib.crc32(b"new rows")])
    fresh = rng.standard_normal((len(rows), old.shape[1])) * old.std()
    rows[len(old) :] = fresh[len(old) :]
    for row in new:
        # One row for all of them, as in the published start.
        rows[row] = fresh[new[0]] if copy_from is None else old[copy_from]
    return rows
