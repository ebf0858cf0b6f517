"""What thoughts look like beside embeddings, and their noise as a distribution."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from coconut.feedback import rules as rules
from mlx_coconut.thoughts.numbers import entropy_of, norm, rho, rms

# ---- the noise as a distribution


def noise_log_density(thought: mx.array, a: mx.array, sigma: float) -> mx.array:
    """log q(thought | a), nats (B,), of a thought drawn as a plus noise of sigma times rms(a).

    thought, a: (B, D). Gradients flow to the mean a alone: the thought was drawn and the scale is
    a constant, as the score term of a policy gradient over thoughts needs.
    """
    scale = sigma * mx.stop_gradient(rms(a))[..., 0]
    d = a.shape[-1]
    return -_distance(mx.stop_gradient(thought), a) / (2 * scale**2) - d * (
        mx.log(scale) + 0.5 * math.log(2 * math.pi)
    )


def noise_kl(a: mx.array, reference: mx.array, sigma: float) -> mx.array:
    """KL(q(.|a) || q(.|reference)), nats (B,), with noise of one size: sigma times rms(a).

    a, reference: (B, D). Gradients flow to both; the scale is a constant.
    """
    scale = sigma * mx.stop_gradient(rms(a))[..., 0]
    return _distance(a, reference) / (2 * scale**2)


def _distance(a: mx.array, b: mx.array) -> mx.array:
    """Squared L2 distance over the last axis, in float32."""
    return ((a.astype(mx.float32) - b.astype(mx.float32)) ** 2).sum(axis=-1)


# ---- what thoughts look like


def measure(model, thoughts: Sequence[mx.array], sources: mx.array) -> dict[str, np.ndarray]:
    """How thoughts (R times (B, D)) compare with embeddings and with each other.

    sources (B, R, D): the states after the final norm that they were made from.
    Returns (R, B) each: scale, rms over rho; step_cosine to the thought before (NaN for the first);
    nearest_cosine to the nearest embedding; lens_entropy, nats of what the head reads off a source.
    """
    E = model.embedding.astype(mx.float32)
    a = mx.stack(list(thoughts)).astype(mx.float32)
    unit = a / norm(a)
    steps = (unit[1:] * unit[:-1]).sum(axis=-1)
    nearest = [((u @ E.T) / norm(E)[:, 0]).max(axis=-1) for u in unit]
    scale = rms(a)[..., 0] / rho(model)
    # A latent at a time: all logits at once would be R times as large.
    entropies = [
        entropy_of(model.head(sources[:, i]).astype(mx.float32)) for i in range(len(thoughts))
    ]
    return {
        "scale": np.array(scale),
        "step_cosine": np.concatenate([np.full((1, a.shape[1]), np.nan), np.array(steps)]),
        "nearest_cosine": np.array(mx.stack(nearest)),
        "lens_entropy": np.array(mx.stack(entropies)),
    }
