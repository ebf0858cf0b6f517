"""The sources of feedback rules: what a thought is made of."""

from collections.abc import Callable

import numpy as np
import torch

from coconut.blocks import NEVER
from coconut.feedback import thinking
from coconut.feedback.catalogue import Part
from coconut.feedback.layers import (
    fork_indices,
    span_layers,
    transitions,
)
from coconut.feedback.weights import inverse_gram, random_row
from cuda_coconut.models.base import to_device
from cuda_coconut.thoughts.numbers import (
    at_least_float32,
    best,
    kth_largest,
    largest,
    norm,
    normed,
    over_threshold,
    rms,
)
from cuda_coconut.thoughts.thinker import Thinker

BLOCK = 8192
"""Rows of W that are squared at a time, so that float32 sums stay short."""


def inverse_of_head(model, lam: float) -> torch.Tensor:
    """(WᵀW + λI)⁻¹ (D, D) of the model's head, λ being lam times the mean of WᵀW's diagonal."""
    W = at_least_float32(model.unembedding.detach())
    gram = np.zeros((W.shape[1], W.shape[1]))
    for start in range(0, len(W), BLOCK):
        rows = W[start : start + BLOCK]
        gram += (rows.T @ rows).double().cpu().numpy()
    return torch.from_numpy(inverse_gram(gram, lam)).to(W)


# ---- sources: (thinker, part) -> (B, D)


def mean(t: Thinker, part: Part) -> torch.Tensor:
    """Weighted mean of several layers, uniform or softmax(alpha)."""
    first, end = span_layers(part["layers"], t.feedback.n_layers)
    states = torch.stack([at_least_float32(t.state(n)) for n in range(first, end + 1)])
    if part["norm_each"]:
        states = normed(states)
    if not part["learned"]:
        return states.mean(dim=0)
    w = at_least_float32(t.weight("mean.alpha")).softmax(dim=0)
    return (w[:, None, None] * states).sum(dim=0)


def suppressed(t: Thinker, part: Part) -> torch.Tensor:
    """What layers take away, of the residual stream or of the logits."""
    pairs = transitions(part, t.feedback.n_layers)
    take = removed_logits if part["space"] == "vocab" else removed
    total = sum(take(t, part, *pair) for pair in pairs)
    return total / len(pairs) if part["agg"] == "mean" else total


def removed(t: Thinker, part: Part, a: int, b: int) -> torch.Tensor:
    """Coordinates suppressed between h^a and h^b, which are raw residuals; the rest is 0."""
    before, after = (at_least_float32(t.layers[n]) for n in (a, b))
    is_signed = part["sign"] == "signed"
    drop = before - after if is_signed else before.abs() - after.abs()
    mask = over_threshold(drop, before, part)
    return mask * {"removed": before - after, "before": before, "after": after}[part["value"]]


def removed_logits(t: Thinker, part: Part, a: int, b: int) -> torch.Tensor:
    """Logit mass removed between the lenses of h^a and h^b, through W⁺ back to a state."""
    ha, hb = (at_least_float32(t.model.final_norm(t.layers[n])) for n in (a, b))
    W = t.once("W", lambda: at_least_float32(t.model.unembedding))
    # twin: autocast would round the logits, of which small differences count here.
    with torch.autocast(W.device.type, enabled=False):
        if part["subset"]:
            # A vocabulary for each row: W (B, k, D), and W⁺ is that matrix's own.
            logits = at_least_float32(t.last).detach() @ W.detach().T
            W = W[largest(logits, part["subset"])]
            za, zb = ((W @ h[..., None])[..., 0] for h in (ha, hb))
        else:
            za, zb = (h @ W.T for h in (ha, hb))
        drop = za - zb
        mask = over_threshold(drop, za, part)
        kind, x = part["threshold"]
        tau = 0.0 if kind == "topk" else x if kind == "abs" else x * rms(za).detach()
        r = mask * (drop - tau)
        if part["tokens"]:
            r = r * (r >= kth_largest(r, part["tokens"]))
        r = r - r.mean(dim=-1, keepdim=True)  # the same on all tokens is invisible to the softmax
        if part["subset"]:
            inverse = inverse_of(W.detach(), part["lam"])
            return ((r[:, None] @ W) @ inverse)[:, 0]
        return (r @ W) @ t.once("inverse", lambda: t.feedback.inverses.of(t.model))


def inverse_of(W: torch.Tensor, lam: float) -> torch.Tensor:
    """(WᵀW + λI)⁻¹ (B, D, D) of each row's W (B, k, D), solved in float64."""
    gram = W.double().mT @ W.double()
    scale = lam * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Without the check, for which the host would wait: gram + scale is positive.
    inverse, _ = torch.linalg.inv_ex(gram + scale[:, None, None] * eye)
    return inverse.to(W.dtype)


def suppressed_fork(t: Thinker, part: Part) -> torch.Tensor:
    """The fork's sum over layers of H[l+1] where H[l+1] - H[l] < -0.1, in transformers' list."""
    n_layers = t.feedback.n_layers

    def entry(n: int) -> torch.Tensor:
        return at_least_float32(t.last if n == n_layers else t.layers[n])

    def fallen(n: int) -> torch.Tensor:
        mask = entry(n + 1) - entry(n) < -part["threshold"]
        return mask * entry(n + 1)

    return sum(fallen(n) for n in fork_indices(part, n_layers))


def soft(t: Thinker, part: Part) -> torch.Tensor:
    """Mean embedding under the model's own next-token distribution."""
    E = t.model.embedding
    logits = t.logits(part["eos"]) / part["tau"]
    if t.may_stop and part["stop"]:
        t.note_entropy(logits, part)
    hard = E[best(logits)] if part["straight_through"] else None
    if part["topk"] or part["topp"] < 1:
        index = largest(logits, part["topk"] or logits.shape[-1])
        logits, E = logits.gather(-1, index), E[index]
        if part["topp"] < 1:
            p = logits.softmax(dim=-1)
            # The token that reaches topp is kept, so at least one is.
            logits = logits.masked_fill(p.cumsum(dim=-1) - p >= part["topp"], NEVER)
    p = logits.softmax(dim=-1)
    mixed = _mix(p, E)
    if part["renorm"]:
        norms = at_least_float32(E).square().sum(dim=-1).sqrt()
        mixed = mixed * ((p * norms).sum(dim=-1, keepdim=True) / norm(mixed))
    if hard is not None:
        mixed = mixed + (hard - mixed).detach()
    return mixed


def _mix(p: torch.Tensor, E: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of p (B, N) times E, (N, D) or (B, N, D), in float32."""
    p = p.to(E.dtype)
    return at_least_float32(p @ E if E.ndim == 2 else (p[:, None] @ E)[:, 0])


def token(t: Thinker, part: Part) -> torch.Tensor:
    """The embedding of <|latent|>."""
    return t.model.embedding[t.feedback.setup.markers[2]].expand_as(t.last)


def zero(t: Thinker, part: Part) -> torch.Tensor:
    """Nothing."""
    return torch.zeros_like(t.last)


def random(t: Thinker, part: Part) -> torch.Tensor:
    """One fixed random row at scale rho."""

    def drawn() -> torch.Tensor:
        return to_device(random_row(part, t.feedback.width), t.last.device).to(t.last.dtype)

    row = t.once("row", drawn)
    return (row * t.rho).expand_as(t.last)


def shuffle(t: Thinker, part: Part) -> torch.Tensor:
    """ĥ of another row."""
    if "partners" not in t.prepared:
        raise ValueError("shuffle: give latent_forward what feedback.prepare made of the batch")
    return t.last[t.prepared["partners"][t.latent]]


SOURCES: dict[str, Callable[[Thinker, Part], torch.Tensor]] = thinking.SOURCES | {
    "mean": mean,
    "suppressed": suppressed,
    "suppressed_fork": suppressed_fork,
    "soft": soft,
    "token": token,
    "zero": zero,
    "random": random,
    "shuffle": shuffle,
}
