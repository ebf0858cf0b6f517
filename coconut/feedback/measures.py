"""What thoughts look like beside embeddings, and their noise as a distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from coconut.blocks import Array
from coconut.feedback.sizes import entropy_of, norm, rho, rms
from coconut.feedback.statistics import ThoughtStatistics

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


@dataclass(frozen=True)
class Table:
    """What every measurement needs of a model's embedding, until its weights change.

    norms (V,): L2 norm of each row; rho: their mean rms.
    """

    norms: Array
    rho: Array

    @classmethod
    def of(cls, xp: Any, model: Any) -> Self:
        """Read from a model."""
        E = xp.at_least_float32(xp.detach(model.embedding))
        return cls(norm(xp, E)[:, 0], rho(xp, model))


AT_ONCE = 64
"""Thoughts, or those of one latent if they are more, that one product reads: its result, like the
logits of as many tokens, is as wide as the vocabulary."""


def measure(
    xp: Any, model: Any, thoughts: Sequence[Array], sources: Array, table: Table
) -> dict[str, np.ndarray]:
    """How thoughts (R times (B, D)) compare with embeddings and with each other.

    sources (B, R, D): the states after the final norm that they were made from.
    Returns (R, B) each: scale, rms over rho; step_cosine to the thought before (NaN for the first);
    nearest_cosine to the nearest embedding; lens_entropy, nats of what the head reads off a source.
    """
    E = xp.at_least_float32(model.embedding)
    a = xp.at_least_float32(xp.stack(list(thoughts)))
    R, B, D = a.shape
    unit = a / norm(xp, a)
    steps = xp.to_host((unit[1:] * unit[:-1]).sum(axis=-1))
    units, states = unit.reshape(R * B, D), sources.swapaxes(0, 1).reshape(R * B, D)
    nearest, entropies = [], []
    for start in range(0, R * B, n := max(B, AT_ONCE)):
        part = slice(start, start + n)
        nearest.append(xp.amax((units[part] @ E.T) / table.norms, axis=-1))
        entropies.append(entropy_of(xp, xp.at_least_float32(model.head(states[part]))))
    return {
        "scale": xp.to_host(rms(xp, a)[..., 0] / table.rho),
        "step_cosine": np.concatenate([np.full((1, B), np.nan), steps]),
        "nearest_cosine": xp.to_host(xp.concatenate(nearest)).reshape(R, B),
        "lens_entropy": xp.to_host(xp.concatenate(entropies)).reshape(R, B),
    }


def add_to(
    statistics: ThoughtStatistics, xp: Any, model: Any, state: Any, n_rows: int | None, table: Table
) -> None:
    """Measure the thoughts of a `LatentOutput`'s first rows, those of which have the latent."""
    n, has = len(state.thoughts), state.inputs.latents_on_host()
    # Latents stand in one run of columns, the same for all rows.
    first = int(np.argmax(has.any(axis=0)))
    has = has[:n_rows, first : first + n]
    sources = state.hidden[:n_rows, first - 1 : first - 1 + n]
    thoughts = [thought[:n_rows] for thought in state.thoughts]
    statistics.add(measure(xp, model, thoughts, sources, table), has)
    statistics.add_rank(state.thoughts_on_host()[:, :n_rows], has)
