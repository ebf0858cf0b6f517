"""The sources of feedback rules: what a thought is made of. xp: see sizes.py."""

from collections.abc import Callable
from typing import Any

import numpy as np

from coconut.blocks import Array
from coconut.feedback.catalogue import Part
from coconut.feedback.layers import (
    depth_index,
    fork_indices,
    hf_index,
    layer_index,
    span_layers,
    transitions,
)
from coconut.feedback.sizes import norm, normed, over_threshold, rms
from coconut.feedback.thinking import Thinker
from coconut.feedback.weights import inverse_gram, random_row

BLOCK = 8192
"""Rows of W that are squared at a time, so that float32 sums stay short."""


def inverse_of_head(model: Any, lam: float) -> Array:
    """(WᵀW + λI)⁻¹ (D, D) of the model's head, λ being lam times the mean of WᵀW's diagonal."""
    xp = model.feedback.xp
    W = xp.at_least_float32(xp.detach(model.unembedding))
    gram = np.zeros((W.shape[1], W.shape[1]))
    for start in range(0, len(W), BLOCK):
        gram += xp.gram(W[start : start + BLOCK])
    return xp.cast(xp.from_host(inverse_gram(gram, lam), W), W)


# ---- sources: (thinker, part) -> (B, D)


def last(t: Thinker, part: Part) -> Array:
    """ĥ, the state after the final norm: what the published checkpoints were trained on."""
    return t.last


def layer(t: Thinker, part: Part) -> Array:
    """h^n, negative counts from the top."""
    return t.state(layer_index(part["n"], t.feedback.n_layers))


def depth(t: Thinker, part: Part) -> Array:
    """h^l at a share of the depth."""
    return t.state(depth_index(part["f"], t.feedback.n_layers))


def hf(t: Thinker, part: Part) -> Array:
    """Entry n of transformers' hidden_states, whose last is ĥ."""
    n = hf_index(part["n"], t.feedback.n_layers)
    return t.last if n == t.feedback.n_layers else t.state(n)


def mean(t: Thinker, part: Part) -> Array:
    """Weighted mean of several layers, uniform or softmax(alpha)."""
    first, end = span_layers(part["layers"], t.feedback.n_layers)
    states = t.xp.stack([t.xp.at_least_float32(t.state(n)) for n in range(first, end + 1)])
    if part["norm_each"]:
        states = normed(t.xp, states)
    if not part["learned"]:
        return states.mean(axis=0)
    w = t.xp.softmax(t.xp.at_least_float32(t.weight("mean.alpha")), axis=0)
    return (w[:, None, None] * states).sum(axis=0)


def prev_input(t: Thinker, part: Part) -> Array:
    """u_s: the input of the column itself, before any position embedding."""
    return t.input


def suppressed(t: Thinker, part: Part) -> Array:
    """What layers take away, of the residual stream or of the logits."""
    pairs = transitions(part, t.feedback.n_layers)
    take = removed_logits if part["space"] == "vocab" else removed
    total = sum(take(t, part, *pair) for pair in pairs)
    return total / len(pairs) if part["agg"] == "mean" else total


def removed(t: Thinker, part: Part, a: int, b: int) -> Array:
    """Coordinates suppressed between h^a and h^b, which are raw residuals; the rest is 0."""
    before, after = (t.xp.at_least_float32(t.layers[n]) for n in (a, b))
    is_signed = part["sign"] == "signed"
    drop = before - after if is_signed else before.abs() - after.abs()
    mask = over_threshold(t.xp, drop, before, part)
    return mask * {"removed": before - after, "before": before, "after": after}[part["value"]]


def removed_logits(t: Thinker, part: Part, a: int, b: int) -> Array:
    """Logit mass removed between the lenses of h^a and h^b, through W⁺ back to a state."""
    xp = t.xp
    ha, hb = (xp.at_least_float32(t.model.final_norm(t.layers[n])) for n in (a, b))
    W = t.once("W", lambda: xp.at_least_float32(t.model.unembedding))
    # Rounded logits would not do: small differences count here.
    with xp.unrounded(W):
        if part["subset"]:
            # A vocabulary for each row: W (B, k, D), and W⁺ is that matrix's own.
            logits = xp.detach(xp.at_least_float32(t.last)) @ xp.detach(W).T
            W = W[xp.largest(logits, part["subset"])]
            za, zb = ((W @ h[..., None])[..., 0] for h in (ha, hb))
        else:
            za, zb = (h @ W.T for h in (ha, hb))
        drop = za - zb
        mask = over_threshold(xp, drop, za, part)
        kind, x = part["threshold"]
        tau = 0.0 if kind == "topk" else x if kind == "abs" else x * xp.detach(rms(xp, za))
        r = mask * (drop - tau)
        if part["tokens"]:
            r = r * xp.ones_where(r >= xp.kth_largest(r, part["tokens"]))
        r = r - r.mean(axis=-1, keepdims=True)  # the same on all tokens is invisible to the softmax
        if part["subset"]:
            inverse = xp.inverse_of(xp.detach(W), part["lam"])
            return ((r[:, None] @ W) @ inverse)[:, 0]
        return (r @ W) @ t.once("inverse", lambda: t.feedback.inverses.of(t.model))


def suppressed_fork(t: Thinker, part: Part) -> Array:
    """The fork's sum over layers of H[l+1] where H[l+1] - H[l] < -0.1, in transformers' list."""
    n_layers = t.feedback.n_layers

    def entry(n: int) -> Array:
        return t.xp.at_least_float32(t.last if n == n_layers else t.layers[n])

    def fallen(n: int) -> Array:
        mask = entry(n + 1) - entry(n) < -part["threshold"]
        return t.xp.ones_where(mask) * entry(n + 1)

    return sum(fallen(n) for n in fork_indices(part, n_layers))


def soft(t: Thinker, part: Part) -> Array:
    """Mean embedding under the model's own next-token distribution."""
    xp, E = t.xp, t.model.embedding
    logits = t.logits(part["eos"]) / part["tau"]
    if t.may_stop and part["stop"]:
        t.note_entropy(logits, part)
    hard = E[xp.best(logits)] if part["straight_through"] else None
    if part["topk"] or part["topp"] < 1:
        index = xp.largest(logits, part["topk"] or logits.shape[-1])
        logits, E = xp.take_along_axis(logits, index, axis=-1), E[index]
        if part["topp"] < 1:
            p = xp.softmax(logits, axis=-1)
            # The token that reaches topp is kept, so at least one is.
            logits = xp.never_where(p.cumsum(axis=-1) - p >= part["topp"], logits)
    p = xp.softmax(logits, axis=-1)
    mixed = _mix(xp, p, E)
    if part["renorm"]:
        norms = xp.at_least_float32(E).square().sum(axis=-1).sqrt()
        mixed = mixed * ((p * norms).sum(axis=-1, keepdims=True) / norm(xp, mixed))
    if hard is not None:
        mixed = mixed + xp.detach(hard - mixed)
    return mixed


def _mix(xp: Any, p: Array, E: Array) -> Array:
    """Sum over tokens of p (B, N) times E, (N, D) or (B, N, D), in float32."""
    p = xp.cast(p, E)
    return xp.at_least_float32(p @ E if E.ndim == 2 else (p[:, None] @ E)[:, 0])


def token(t: Thinker, part: Part) -> Array:
    """The embedding of <|latent|>."""
    return t.xp.broadcast_to(t.model.embedding[t.feedback.setup.markers[2]], t.last.shape)


def zero(t: Thinker, part: Part) -> Array:
    """Nothing."""
    return t.xp.zeros_like(t.last)


def random(t: Thinker, part: Part) -> Array:
    """One fixed random row at scale rho."""

    def drawn() -> Array:
        return t.xp.from_host(random_row(part, t.feedback.width), t.last)

    row = t.once(str(part), drawn)
    return t.xp.broadcast_to(row * t.rho, t.last.shape)


def shuffle(t: Thinker, part: Part) -> Array:
    """ĥ of another row."""
    if "partners" not in t.prepared:
        raise ValueError("shuffle: give latent_forward what feedback.prepare made of the batch")
    return t.last[t.prepared["partners"][t.latent]]


SOURCES: dict[str, Callable[[Thinker, Part], Array]] = {
    "last": last,
    "layer": layer,
    "depth": depth,
    "hf": hf,
    "mean": mean,
    "prev_input": prev_input,
    "suppressed": suppressed,
    "suppressed_fork": suppressed_fork,
    "soft": soft,
    "token": token,
    "zero": zero,
    "random": random,
    "shuffle": shuffle,
}
