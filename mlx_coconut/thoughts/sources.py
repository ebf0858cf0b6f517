"""The sources of feedback rules: what a thought is made of."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from coconut.blocks import NEVER
from coconut.feedback import thinking
from coconut.feedback.catalogue import Part
from coconut.feedback.layers import (
    fork_indices,
    span_layers,
    transitions,
)
from coconut.feedback.weights import inverse_gram, random_row
from mlx_coconut.thoughts.numbers import (
    best,
    kth_largest,
    largest,
    norm,
    normed,
    over_threshold,
    rms,
)
from mlx_coconut.thoughts.thinker import Thinker

BLOCK = 8192
"""Rows of W that are squared at a time, so that float32 sums stay short."""


def inverse_of_head(model, lam: float) -> mx.array:
    """(WᵀW + λI)⁻¹ (D, D) of the model's head, λ being lam times the mean of WᵀW's diagonal."""
    W = model.unembedding.astype(mx.float32)
    gram = np.zeros((W.shape[1], W.shape[1]))
    for start in range(0, len(W), BLOCK):
        rows = W[start : start + BLOCK]
        gram += np.array(rows.T @ rows, np.float64)
    return mx.array(inverse_gram(gram, lam).astype(np.float32))


# ---- sources: (thinker, part) -> (B, D)


def mean(t: Thinker, part: Part) -> mx.array:
    """Weighted mean of several layers, uniform or softmax(alpha)."""
    first, end = span_layers(part["layers"], t.feedback.n_layers)
    states = mx.stack([t.state(n) for n in range(first, end + 1)]).astype(mx.float32)
    if part["norm_each"]:
        states = normed(states)
    if not part["learned"]:
        return states.mean(axis=0)
    w = mx.softmax(t.weight("mean.alpha").astype(mx.float32))
    return (w[:, None, None] * states).sum(axis=0)


def suppressed(t: Thinker, part: Part) -> mx.array:
    """What layers take away, of the residual stream or of the logits."""
    pairs = transitions(part, t.feedback.n_layers)
    take = removed_logits if part["space"] == "vocab" else removed
    total = sum(take(t, part, *pair) for pair in pairs)
    return total / len(pairs) if part["agg"] == "mean" else total


def removed(t: Thinker, part: Part, a: int, b: int) -> mx.array:
    """Coordinates suppressed between h^a and h^b, which are raw residuals; the rest is 0."""
    before, after = (t.layers[n].astype(mx.float32) for n in (a, b))
    is_signed = part["sign"] == "signed"
    drop = before - after if is_signed else mx.abs(before) - mx.abs(after)
    mask = mx.stop_gradient(over_threshold(drop, before, part).astype(mx.float32))
    return mask * {"removed": before - after, "before": before, "after": after}[part["value"]]


def removed_logits(t: Thinker, part: Part, a: int, b: int) -> mx.array:
    """Logit mass removed between the lenses of h^a and h^b, through W⁺ back to a state."""
    ha, hb = (t.model.final_norm(t.layers[n]).astype(mx.float32) for n in (a, b))
    W = t.once("W", lambda: t.model.unembedding.astype(mx.float32))
    if part["subset"]:
        # A vocabulary for each row: W (B, k, D), and W⁺ is that matrix's own.
        logits = mx.stop_gradient(t.last.astype(mx.float32)) @ mx.stop_gradient(W).T
        W = W[largest(logits, part["subset"])]
        za, zb = ((W @ h[..., None])[..., 0] for h in (ha, hb))
    else:
        za, zb = (h @ W.T for h in (ha, hb))
    drop = za - zb
    mask = mx.stop_gradient(over_threshold(drop, za, part).astype(mx.float32))
    kind, x = part["threshold"]
    tau = 0.0 if kind == "topk" else x if kind == "abs" else x * mx.stop_gradient(rms(za))
    r = mask * (drop - tau)
    if part["tokens"]:
        r = r * mx.stop_gradient((r >= kth_largest(r, part["tokens"])).astype(mx.float32))
    r = r - r.mean(axis=-1, keepdims=True)  # the same on all tokens is invisible to the softmax
    if part["subset"]:
        inverse = inverse_of(mx.stop_gradient(W), part["lam"])
        return ((r[:, None] @ W) @ inverse)[:, 0]
    return (r @ W) @ t.once("inverse", lambda: t.feedback.inverses.of(t.model))


def inverse_of(W: mx.array, lam: float) -> mx.array:
    """(WᵀW + λI)⁻¹ (B, D, D) of each row's W (B, k, D), solved in float64."""
    cpu = mx.cpu  # twin: MLX has float64 and inverses on the CPU only
    W = W.astype(mx.float64, stream=cpu)
    gram = mx.matmul(W.swapaxes(-1, -2), W, stream=cpu)
    scale = lam * mx.trace(gram, axis1=-2, axis2=-1, stream=cpu) / gram.shape[-1]
    eye = mx.eye(gram.shape[-1], dtype=mx.float64, stream=cpu)
    loaded = mx.add(gram, mx.multiply(scale[:, None, None], eye, stream=cpu), stream=cpu)
    return mx.linalg.inv(loaded, stream=cpu).astype(mx.float32, stream=cpu)


def suppressed_fork(t: Thinker, part: Part) -> mx.array:
    """The fork's sum over layers of H[l+1] where H[l+1] - H[l] < -0.1, in transformers' list."""
    n_layers = t.feedback.n_layers

    def entry(n: int) -> mx.array:
        return (t.last if n == n_layers else t.layers[n]).astype(mx.float32)

    def fallen(n: int) -> mx.array:
        mask = entry(n + 1) - entry(n) < -part["threshold"]
        return mx.stop_gradient(mask.astype(mx.float32)) * entry(n + 1)

    return sum(fallen(n) for n in fork_indices(part, n_layers))


def soft(t: Thinker, part: Part) -> mx.array:
    """Mean embedding under the model's own next-token distribution."""
    E = t.model.embedding
    logits = t.logits(part["eos"]) / part["tau"]
    if t.may_stop and part["stop"]:
        t.note_entropy(logits, part)
    hard = E[best(logits)] if part["straight_through"] else None
    if part["topk"] or part["topp"] < 1:
        index = largest(logits, part["topk"] or logits.shape[-1])
        logits, E = mx.take_along_axis(logits, index, axis=-1), E[index]
        if part["topp"] < 1:
            p = mx.softmax(logits, axis=-1)
            # The token that reaches topp is kept, so at least one is.
            spare = mx.stop_gradient(mx.cumsum(p, axis=-1) - p >= part["topp"])
            logits = logits + spare.astype(mx.float32) * NEVER
    p = mx.softmax(logits, axis=-1)
    mixed = _mix(p, E)
    if part["renorm"]:
        norms = mx.sqrt((E.astype(mx.float32) ** 2).sum(axis=-1))
        mixed = mixed * ((p * norms).sum(axis=-1, keepdims=True) / norm(mixed))
    if hard is not None:
        mixed = mixed + mx.stop_gradient(hard - mixed)
    return mixed


def _mix(p: mx.array, E: mx.array) -> mx.array:
    """Sum over tokens of p (B, N) times E, (N, D) or (B, N, D), in float32."""
    p = p.astype(E.dtype)
    return (p @ E if E.ndim == 2 else (p[:, None] @ E)[:, 0]).astype(mx.float32)


def token(t: Thinker, part: Part) -> mx.array:
    """The embedding of <|latent|>."""
    return mx.broadcast_to(t.model.embedding[t.feedback.setup.markers[2]], t.last.shape)


def zero(t: Thinker, part: Part) -> mx.array:
    """Nothing."""
    return mx.zeros_like(t.last)


def random(t: Thinker, part: Part) -> mx.array:
    """One fixed random row at scale rho."""
    row = mx.array(random_row(part, t.feedback.width))
    return mx.broadcast_to(row * t.rho, t.last.shape)


def shuffle(t: Thinker, part: Part) -> mx.array:
    """ĥ of another row."""
    if "partners" not in t.prepared:
        raise ValueError("shuffle: give latent_forward what feedback.prepare made of the batch")
    return t.last[t.prepared["partners"][t.latent]]


SOURCES: dict[str, Callable[[Thinker, Part], mx.array]] = thinking.SOURCES | {
    "mean": mean,
    "suppressed": suppressed,
    "suppressed_fork": suppressed_fork,
    "soft": soft,
    "token": token,
    "zero": zero,
    "random": random,
    "shuffle": shuffle,
}
