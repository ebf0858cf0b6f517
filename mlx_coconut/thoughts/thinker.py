"""Feedback rules: the states of one column -> the input of the latent behind it.

Names, options and where they are explained: coconut/feedback.py, docs/feedback.md.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from coconut.batches.batch import Batch
from coconut.errors import UserError
from coconut.feedback import rules as rules
from coconut.feedback.rules import EPS, Part, Setup
from mlx_coconut.models.base import NEVER, Tap, additive_mask

PREFIX = "feedback."
"""Of the rule's weights among the model's parameters."""
BLOCK = 8192
"""Rows of W that are squared at a time, so that float32 sums stay short."""


class Feedback(nn.Module):
    """A rule on a model, with its trained weights.

    It lies in the model as `model.feedback`, so that its weights are parameters like any other.
    """

    def __init__(self, setup: Setup, n_layers: int, width: int):
        super().__init__()
        self.setup, self.rule = setup, setup.rule
        self.n_layers, self.width = n_layers, width
        self.wanted = setup.rule.layers(n_layers)
        self.version = 0
        """Counts changes of the model's parameters; whoever changes them adds 1."""
        self.inverses = Inverses(setup.rule)
        for name, shape in rules.shapes(self.rule, n_layers, width).items():
            part, _, weight = name.partition(".")
            self.setdefault(part, {})[weight] = mx.zeros(shape)


class Inverses:
    """The inverse of WᵀW that `suppressed` needs, kept for one model and one state of it."""

    def __init__(self, rule: rules.Rule):
        self.rule = rule
        self._kept: dict[bool, tuple[Any, int, mx.array]] = {}

    def of(self, model, training: bool = False) -> mx.array:
        """(WᵀW + λI)⁻¹ (D, D) of this model, anew when the one kept is too old.

        In training it may be `refresh` updates old, otherwise it is of the present parameters.
        """
        refresh = self.rule.refresh if training else 1
        version = model.feedback.version
        owner, made_at, inverse = self._kept.get(training, (None, 0, None))
        if inverse is not None and owner() is model:
            if not refresh or 0 <= version - made_at < refresh:
                return inverse
        W = model.unembedding.astype(mx.float32)
        gram = np.zeros((W.shape[1], W.shape[1]))
        for start in range(0, len(W), BLOCK):
            rows = W[start : start + BLOCK]
            gram += np.array(rows.T @ rows, np.float64)
        part = self.rule.find("suppressed")
        assert part is not None, "only asked for by it"
        inverse = mx.array(rules.inverse_gram(gram, part["lam"]).astype(np.float32))
        # Training and the rest apart: an evaluation in between must not change a run.
        self._kept[training] = (weakref.ref(model), version, inverse)
        return inverse

    def forget(self) -> None:
        """Make them anew at the next use, as a resumed run does."""
        self._kept = {}


def attach(
    model, setup: Setup | None, seed: int = 0, trained: dict[str, mx.array] | None = None
) -> None:
    """Let a model think by a rule; the published rule and none leave it as it is.

    trained: the rule's weights without prefix, if a checkpoint has them; otherwise they start from
    the seed. Raises UserError if the model lacks a layer or a marker, or weights do not fit.
    """
    model.feedback = None
    if setup is None or setup.rule.is_last or setup.rule.is_token:
        return
    n_layers, (n_rows, width) = len(model.layers), model.embedding.shape
    if problems := setup.problems(n_layers, n_rows):
        raise UserError("model", *problems)
    feedback = Feedback(setup, n_layers, width)
    if trained is None:
        drawn = rules.initial_weights(setup.rule, n_layers, width, rho(model).item(), seed)
        trained = {name: mx.array(w) for name, w in drawn.items()}
    set_trained(feedback, trained)
    model.feedback = feedback


def set_trained(feedback: Feedback, weights: dict[str, mx.array]) -> None:
    """Put all of a checkpoint's weights into a rule.

    Raises UserError if they are not those that it needs.
    """
    expected = rules.shapes(feedback.rule, feedback.n_layers, feedback.width)
    found = {name: w.shape for name, w in weights.items()}
    if found != expected:
        raise UserError(
            f"feedback {feedback.rule}",
            f"needs the weights {describe_shapes(expected)}, the checkpoint has"
            f" {describe_shapes(found)}",
        )
    set_weights(feedback, weights)


def describe_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Names and shapes as a message shows them."""
    return ", ".join(f"{n} {tuple(s)}" for n, s in sorted(shapes.items())) or "none"


def set_weights(feedback: Feedback, weights: dict[str, mx.array]) -> None:
    """Put weights by name into a rule."""
    for name, w in weights.items():
        part, _, weight = name.partition(".")
        feedback[part][weight] = w.astype(mx.float32)


def fit(model, batches: Iterable[Batch]) -> None:
    """Fit the rule's `linear` by least squares: from ĥ to the embedding of the next token.

    batches: ordinary text, without latents.
    """
    feedback = model.feedback
    part = feedback.rule.find("linear")
    sums = rules.RidgeSums(feedback.width)
    for batch in batches:
        ids, mask = mx.array(batch.ids), mx.array(batch.mask)
        columns = additive_mask(mask, 0, ids.shape[1], mx.float32)
        hidden = model.trunk(model.embed(ids), mx.array(batch.positions), columns)
        has_next = batch.mask[:, :-1] & batch.mask[:, 1:]
        sums.add(np.array(hidden)[:, :-1][has_next], np.array(model.embed(ids))[:, 1:][has_next])
    P, b = sums.solve(part["lam"])
    set_weights(feedback, {"linear.weight": mx.array(P), "linear.bias": mx.array(b)})


def prepare(
    model,
    batch: Batch,
    key: Sequence[int],
    training: bool = False,
    progress: float = 0.0,
    decoding: bool = False,
) -> dict[str, mx.array]:
    """What the model's rule needs for a batch beside its states; empty for most rules.

    key: numbers that name the update; progress: share of the run that is done. decoding: rows that
    are sure may end their latents. See `coconut.feedback.prepare`.
    """
    feedback = model.feedback
    if feedback is None:
        return {}
    made = rules.prepare(feedback.rule, batch, feedback.width, key, training, progress)
    arrays = {name: mx.array(a) for name, a in made.items()}
    if feedback.rule.refresh is not None and batch.n_passes:
        arrays["inverse"] = feedback.inverses.of(model, training)
    if decoding and feedback.rule.stop:
        arrays["may_stop"] = mx.array(True)
    return arrays


class Thinker:
    """What a rule reads at the column before a latent, and the thought it makes of it.

    One for a forward pass: `watch` before each run of the trunk, `think` after it.
    """

    def __init__(self, model, prepared: dict[str, mx.array] | None = None):
        self.model, self.prepared = model, prepared or {}
        self.feedback = model.feedback
        self.layers: dict[int, mx.array] = {}
        """Raw h^l (B, D) of the layers that the rule wants."""
        self.latent = 0
        self.may_stop = "may_stop" in self.prepared
        self.has_stopped: mx.array | None = None
        self._n_sure: mx.array | None = None
        self._once = {name: a for name, a in self.prepared.items() if name == "inverse"}

    def watch(self, x: mx.array, positions: mx.array) -> Tap:
        """Begin a pass over inputs x (B, T, D); the tap keeps what the rule wants."""
        self.input, self._position = x[:, -1], positions[:, -1]
        self.layers = {}

        def tap(layer: int, h: mx.array) -> None:
            if layer in self.feedback.wanted:
                self.layers[layer] = h[:, -1]

        return tap

    def think(self, last: mx.array, latent: int) -> mx.array:
        """The thought (B, D) behind a column whose state after the final norm is `last`."""
        self.last, self.latent = last, latent
        self._logits: mx.array | None = None
        rule = self.feedback.rule
        first, *others = (SOURCES[part.name](self, part) for part in rule.sources)
        a = sum(others, first)
        for part in rule.transforms:
            a = TRANSFORMS[part.name](self, part, a)
        if "noise" in self.prepared:
            scale = mx.stop_gradient(rms(a))
            a = a + scale * self.prepared["noise"][latent]
        return a.astype(last.dtype)

    def state(self, layer: int) -> mx.array:
        """h^layer (B, D); h^0 without the position embedding, which the next input gets anew."""
        h = self.layers[layer]
        offset = self.model.position_embedding(self._position) if layer == 0 else None
        return h if offset is None else h - offset

    def weight(self, name: str) -> mx.array:
        """A trained weight of the rule, by part.weight."""
        part, _, weight = name.partition(".")
        return self.feedback[part][weight]

    def once(self, name: str, make: Callable[[], mx.array]) -> mx.array:
        """A value that all passes share."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    @property
    def rho(self) -> mx.array:
        """Mean rms of an embedding row, without gradient."""
        return self.once("rho", lambda: rho(self.model))

    def logits(self, with_eos: bool = False) -> mx.array:
        """float32 logits (B, V) of ĥ; markers, spare rows and eos are out of reach."""
        if self._logits is None:
            self._logits = self.model.head(self.last).astype(mx.float32)
        n_rows = self._logits.shape[-1]
        out = mx.array(self.feedback.setup.excluded(with_eos, n_rows))
        return self._logits * (1 - out) + out * NEVER

    def note_entropy(self, logits: mx.array, part: Part) -> None:
        """Count for how many latents a row has been sure; from `patience` on its latents end."""
        entropy = entropy_of(logits)
        if self._n_sure is None or self.has_stopped is None:
            self._n_sure = mx.zeros(entropy.shape)
            self.has_stopped = mx.zeros(entropy.shape, mx.bool_)
        self._n_sure = (self._n_sure + 1) * (entropy < part["stop"])
        self.has_stopped = self.has_stopped | (self._n_sure >= part["patience"])


def entropy_of(logits: mx.array) -> mx.array:
    """Entropy in nats (...) of the distribution that float32 logits (..., V) stand for."""
    p = mx.softmax(logits, axis=-1)
    return -(p * mx.log(mx.maximum(p, 1e-30))).sum(axis=-1)


def rho(model) -> mx.array:
    """Mean over the vocabulary of the rms of an embedding row, without gradient."""
    return rms(mx.stop_gradient(model.embedding)).mean()


def rms(a: mx.array) -> mx.array:
    """Root mean square over the last axis, kept, in float32."""
    a = a.astype(mx.float32)
    return mx.sqrt((a * a).mean(axis=-1, keepdims=True))


def normed(a: mx.array) -> mx.array:
    """a / max(rms(a), EPS), in float32; the gradient at 0 is finite."""
    a = a.astype(mx.float32)
    return a / mx.sqrt(mx.maximum((a * a).mean(axis=-1, keepdims=True), EPS * EPS))


# ---- sources: (thinker, part) -> (B, D)


def last(t: Thinker, part: Part) -> mx.array:
    """ĥ, the state after the final norm: what the published checkpoints were trained on."""
    return t.last


def layer(t: Thinker, part: Part) -> mx.array:
    """h^n, negative counts from the top."""
    return t.state(rules.layer_index(part["n"], t.feedback.n_layers))


def depth(t: Thinker, part: Part) -> mx.array:
    """h^l at a share of the depth."""
    return t.state(rules.depth_index(part["f"], t.feedback.n_layers))


def hf(t: Thinker, part: Part) -> mx.array:
    """Entry n of transformers' hidden_states, whose last is ĥ."""
    n = rules.hf_index(part["n"], t.feedback.n_layers)
    return t.last if n == t.feedback.n_layers else t.state(n)


def mean(t: Thinker, part: Part) -> mx.array:
    """Weighted mean of several layers, uniform or softmax(alpha)."""
    first, end = rules.span_layers(part["layers"], t.feedback.n_layers)
    states = mx.stack([t.state(n) for n in range(first, end + 1)]).astype(mx.float32)
    if part["norm_each"]:
        states = normed(states)
    if not part["learned"]:
        return states.mean(axis=0)
    w = mx.softmax(t.weight("mean.alpha").astype(mx.float32))
    return (w[:, None, None] * states).sum(axis=0)


def prev_input(t: Thinker, part: Part) -> mx.array:
    """u_s: the input of the column itself, before any position embedding."""
    return t.input


def suppressed(t: Thinker, part: Part) -> mx.array:
    """What layers take away, of the residual stream or of the logits."""
    pairs = rules.transitions(part, t.feedback.n_layers)
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


def over_threshold(drop: mx.array, before: mx.array, part: Part) -> mx.array:
    """Where a drop counts: above the threshold, or among the k largest."""
    kind, x = part["threshold"]
    if kind == "topk":
        return (drop > 0) & (drop >= kth_largest(drop, int(x)))
    return drop > (x * rms(before) if kind == "rel" else x)


def kth_largest(a: mx.array, k: int) -> mx.array:
    """(..., 1): the k-th largest entry of the last axis."""
    n = a.shape[-1]
    k = min(k, n)
    return mx.partition(a, n - k, axis=-1)[..., n - k : n - k + 1]


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

    return sum(fallen(n) for n in rules.fork_indices(part, n_layers))


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


def norm(a: mx.array) -> mx.array:
    """L2 norm over the last axis, kept, not below 1e-12."""
    return mx.sqrt(mx.maximum((a * a).sum(axis=-1, keepdims=True), 1e-24))


def largest(a: mx.array, k: int) -> mx.array:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    a = mx.stop_gradient(a)
    k = min(k, a.shape[-1])
    if k == a.shape[-1]:
        return mx.argsort(-a, axis=-1)
    index = mx.argpartition(-a, k - 1, axis=-1)[..., :k]
    order = mx.argsort(-mx.take_along_axis(a, index, axis=-1), axis=-1)
    return mx.take_along_axis(index, order, axis=-1)


def best(logits: mx.array) -> mx.array:
    """The likeliest token (B,) of each row."""
    return mx.argmax(mx.stop_gradient(logits), axis=-1)


def token(t: Thinker, part: Part) -> mx.array:
    """The embedding of <|latent|>."""
    return mx.broadcast_to(t.model.embedding[t.feedback.setup.markers[2]], t.last.shape)


def zero(t: Thinker, part: Part) -> mx.array:
    """Nothing."""
    return mx.zeros_like(t.last)


def random(t: Thinker, part: Part) -> mx.array:
    """One fixed random row at scale rho."""
    row = mx.array(rules.random_row(part, t.feedback.width))
    return mx.broadcast_to(row * t.rho, t.last.shape)


def shuffle(t: Thinker, part: Part) -> mx.array:
    """ĥ of another row."""
    if "partners" not in t.prepared:
        raise ValueError("shuffle: give latent_forward what feedback.prepare made of the batch")
    return t.last[t.prepared["partners"][t.latent]]


# ---- transforms: (thinker, part, a (B, D)) -> (B, D)


def scaled(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """The direction of a at the scale of an embedding."""
    learned = part["scale"] == "learned"
    return normed(a) * (t.weight("rms.scale") if learned else t.rho)


def ln(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """LayerNorm or RMSNorm (the model's kind) without weights, times rho."""
    a = a.astype(mx.float32)
    of_model = t.model.norm_kind
    if (of_model if part["kind"] == "model" else part["kind"]) == "layer":
        a = a - a.mean(axis=-1, keepdims=True)
    return a * mx.rsqrt((a * a).mean(axis=-1, keepdims=True) + rules.LN_EPS) * t.rho


def final_norm(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """The model's own norm before the head."""
    return t.model.final_norm(a)


def linear(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """P a + b."""
    return a @ t.weight("linear.weight").T + t.weight("linear.bias")


def mlp(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """A residual block: a + W2 phi(W1 norm(a) + b1) + b2, normed again if asked."""
    inner = normed(a) * t.weight("mlp.norm_in")
    inner = inner @ t.weight("mlp.w1").T + t.weight("mlp.b1")
    a = a + activation(part, inner) @ t.weight("mlp.w2").T + t.weight("mlp.b2")
    return normed(a) * t.weight("mlp.norm_out") if part["norm_out"] else a


def mlp_plain(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """norm(W2 phi(W1 a)): a projection head as published, without the residual."""
    inner = activation(part, a @ t.weight("mlp_plain.w1").T)
    if "kept" in t.prepared:
        inner = inner * t.prepared["kept"][t.latent].astype(inner.dtype)
    return normed(inner @ t.weight("mlp_plain.w2").T) * t.weight("mlp_plain.norm")


def activation(part: Part, a: mx.array) -> mx.array:
    """GELU or SiLU."""
    return nn.gelu(a) if part["phi"] == "gelu" else nn.silu(a)


def gate(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """g a + (1 - g) E[argmax], g read off ĥ."""
    raw = t.last @ t.weight("gate.weight").T + t.weight("gate.bias")
    g = mx.sigmoid(raw.astype(mx.float32))
    return g * a + (1 - g) * t.model.embedding[best(t.logits())]


def detach(t: Thinker, part: Part, a: mx.array) -> mx.array:
    """A constant: no gradient through time."""
    return mx.stop_gradient(a)


SOURCES: dict[str, Callable[[Thinker, Part], mx.array]] = {
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
TRANSFORMS: dict[str, Callable[[Thinker, Part, mx.array], mx.array]] = {
    "rms": scaled,
    "ln": ln,
    "final_norm": final_norm,
    "linear": linear,
    "mlp": mlp,
    "mlp_plain": mlp_plain,
    "gate": gate,
    "detach": detach,
}


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
