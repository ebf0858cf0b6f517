"""What thoughts look like beside embeddings, and their noise as a distribution."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from coconut.feedback import rules as rules
from cuda_coconut.thoughts.numbers import at_least_float32, entropy_of, norm, rho, rms

# ---- the noise as a distribution


def noise_log_density(thought: torch.Tensor, a: torch.Tensor, sigma: float) -> torch.Tensor:
    """log q(thought | a), nats (B,), of a thought drawn as a plus noise of sigma times rms(a).

    thought, a: (B, D). Gradients flow to the mean a alone: the thought was drawn and the scale is
    a constant, as the score term of a policy gradient over thoughts needs.
    """
    scale = sigma * rms(a).detach()[..., 0]
    d = a.shape[-1]
    return -_distance(thought.detach(), a) / (2 * scale**2) - d * (
        scale.log() + 0.5 * math.log(2 * math.pi)
    )


def noise_kl(a: torch.Tensor, reference: torch.Tensor, sigma: float) -> torch.Tensor:
    """KL(q(.|a) || q(.|reference)), nats (B,), with noise of one size: sigma times rms(a).

    a, reference: (B, D). Gradients flow to both; the scale is a constant.
    """
    scale = sigma * rms(a).detach()[..., 0]
    return _distance(a, reference) / (2 * scale**2)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared L2 distance over the last axis, in float32 or more."""
    return ((at_least_float32(a) - at_least_float32(b)) ** 2).sum(dim=-1)


# ---- what thoughts look like


@torch.no_grad()
def measure(
    model, thoughts: Sequence[torch.Tensor], sources: torch.Tensor
) -> dict[str, np.ndarray]:
    """How thoughts (R times (B, D)) compare with embeddings and with each other.

    sources (B, R, D): the states after the final norm that they were made from.
    Returns (R, B) each: scale, rms over rho; step_cosine to the thought before (NaN for the first);
    nearest_cosine to the nearest embedding; lens_entropy, nats of what the head reads off a source.
    """
    E = at_least_float32(model.embedding)
    a = at_least_float32(torch.stack(list(thoughts)))
    unit = a / norm(a)
    steps = (unit[1:] * unit[:-1]).sum(dim=-1)
    nearest = [((u @ E.T) / norm(E)[:, 0]).max(dim=-1).values for u in unit]
    scale = rms(a)[..., 0] / rho(model)
    # A latent at a time: all logits at once would be R times as large.
    entropies = [
        entropy_of(at_least_float32(model.head(sources[:, i]))) for i in range(len(thoughts))
    ]
    return {
        "scale": scale.cpu().numpy(),
        "step_cosine": np.concatenate([np.full((1, a.shape[1]), np.nan), steps.cpu().numpy()]),
        "nearest_cosine": torch.stack(nearest).cpu().numpy(),
        "lens_entropy": torch.stack(entropies).cpu().numpy(),
    }
