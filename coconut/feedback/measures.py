"""What thoughts look like beside embeddings, and their noise as a distribution."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from coconut.blocks import Array
from coconut.feedback.sizes import entropy_of, norm, rho, rms

# ---- the noise as a distribution


def noise_log_density(xp: Any, thought: Array, a: Array, sigma: float) -> Array:
    """log q(thought | a), nats (B,), of a thought drawn as a plus noise of sigma times rms(a).

    thought, a: (B, D). Gradients flow to the mean a alone: the thought was drawn and the scale is
    a constant, as the score term of a policy gradient over thoughts needs.
    """
    scale = sigma * xp.detach(rms(xp, a))[..., 0]
    d = a.shape[-1]
    return -_distance(xp, xp.detach(thought), a) / (2 * scale**2) - d * (
        scale.log() + 0.5 * math.log(2 * math.pi)
    )


def noise_kl(xp: Any, a: Array, reference: Array, sigma: float) -> Array:
    """KL(q(.|a) || q(.|reference)), nats (B,), with noise of one size: sigma times rms(a).

    a, reference: (B, D). Gradients flow to both; the scale is a constant.
    """
    scale = sigma * xp.detach(rms(xp, a))[..., 0]
    return _distance(xp, a, reference) / (2 * scale**2)


def _distance(xp: Any, a: Array, b: Array) -> Array:
    """Squared L2 distance over the last axis, in float32 or more."""
    return (xp.at_least_float32(a) - xp.at_least_float32(b)).square().sum(axis=-1)


# ---- what thoughts look like


def measure(
    xp: Any, model: Any, thoughts: Sequence[Array], sources: Array
) -> dict[str, np.ndarray]:
    """How thoughts (R times (B, D)) compare with embeddings and with each other.

    sources (B, R, D): the states after the final norm that they were made from.
    Returns (R, B) each: scale, rms over rho; step_cosine to the thought before (NaN for the first);
    nearest_cosine to the nearest embedding; lens_entropy, nats of what the head reads off a source.
    """
    E = xp.at_least_float32(model.embedding)
    a = xp.at_least_float32(xp.stack(list(thoughts)))
    unit = a / norm(xp, a)
    steps = xp.to_host((unit[1:] * unit[:-1]).sum(axis=-1))
    nearest = [xp.amax((u @ E.T) / norm(xp, E)[:, 0], axis=-1) for u in unit]
    # A latent at a time: all logits at once would be R times as large.
    entropies = [
        entropy_of(xp, xp.at_least_float32(model.head(sources[:, i]))) for i in range(len(thoughts))
    ]
    return {
        "scale": xp.to_host(rms(xp, a)[..., 0] / rho(xp, model)),
        "step_cosine": np.concatenate([np.full((1, a.shape[1]), np.nan), steps]),
        "nearest_cosine": xp.to_host(xp.stack(nearest)),
        "lens_entropy": xp.to_host(xp.stack(entropies)),
    }
