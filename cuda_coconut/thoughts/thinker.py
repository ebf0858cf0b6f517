"""Feedback rules: the states of one column -> the input of the latent behind it.

Names, options and where they are explained: coconut/feedback.py, docs/feedback.md.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coconut.batches.batch import Batch
from coconut.errors import UserError
from coconut.feedback import rules as rules
from coconut.feedback.rules import EPS, Part, Setup
from cuda_coconut.models.base import NEVER, Tap, additive_mask, to_device
from cuda_coconut.updates.shard import spread_like

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
            if part not in self._modules:
                self.add_module(part, nn.ParameterDict())
            self.get_submodule(part)[weight] = nn.Parameter(torch.zeros(shape))


class Inverses:
    """The inverse of WᵀW that `suppressed` needs, kept for one model and one state of it."""

    def __init__(self, rule: rules.Rule):
        self.rule = rule
        self._kept: dict[bool, tuple[Any, int, torch.Tensor]] = {}

    def of(self, model, training: bool = False) -> torch.Tensor:
        """(WᵀW + λI)⁻¹ (D, D) of this model, anew when the one kept is too old.

        In training it may be `refresh` updates old, otherwise it is of the present parameters.
        """
        refresh = self.rule.refresh if training else 1
        version = model.feedback.version
        owner, made_at, inverse = self._kept.get(training, (None, 0, None))
        if inverse is not None and owner() is model:
            if not refresh or 0 <= version - made_at < refresh:
                return inverse
        W = at_least_float32(model.unembedding.detach())
        gram = np.zeros((W.shape[1], W.shape[1]))
        for start in range(0, len(W), BLOCK):
            rows = W[start : start + BLOCK]
            gram += (rows.T @ rows).double().cpu().numpy()
        part = self.rule.find("suppressed")
        assert part is not None, "only asked for by it"
        inverse = torch.from_numpy(rules.inverse_gram(gram, part["lam"])).to(W)
        # Training and the rest apart: an evaluation in between must not change a run.
        self._kept[training] = (weakref.ref(model), version, inverse)
        return inverse

    def forget(self) -> None:
        """Make them anew at the next use, as a resumed run does."""
        self._kept = {}


def attach(
    model, setup: Setup | None, seed: int = 0, trained: dict[str, torch.Tensor] | None = None
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
        trained = {name: torch.from_numpy(w) for name, w in drawn.items()}
    set_trained(feedback, trained)
    model.feedback = feedback.to(model.embedding.device, model.embedding.dtype)


def set_trained(feedback: Feedback, weights: dict[str, torch.Tensor]) -> None:
    """Put all of a checkpoint's weights into a rule.

    Raises UserError if they are not those that it needs.
    """
    expected = rules.shapes(feedback.rule, feedback.n_layers, feedback.width)
    found = {name: tuple(w.shape) for name, w in weights.items()}
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


def set_weights(feedback: Feedback, weights: dict[str, torch.Tensor]) -> None:
    """Put weights by name into a rule."""
    for name, w in weights.items():
        part, _, weight = name.partition(".")
        own = feedback.get_submodule(part)[weight]
        own.data.copy_(spread_like(w, own))


@torch.no_grad()
def fit(model, batches: Iterable[Batch]) -> None:
    """Fit the rule's `linear` by least squares: from ĥ to the embedding of the next token.

    batches: ordinary text, without latents.
    """
    feedback = model.feedback
    part = feedback.rule.find("linear")
    sums = rules.RidgeSums(feedback.width)
    device = model.embedding.device
    for batch in batches:
        arrays = (batch.ids, batch.mask, batch.positions)
        ids, mask, positions = (torch.from_numpy(a).to(device) for a in arrays)
        x = model.embed(ids)
        hidden = model.trunk(x, positions, additive_mask(mask, 0, ids.shape[1], x.dtype))
        has_next = batch.mask[:, :-1] & batch.mask[:, 1:]
        h, e = (a.cpu().numpy() for a in (hidden, x))
        sums.add(h[:, :-1][has_next], e[:, 1:][has_next])
    P, b = (torch.from_numpy(w) for w in sums.solve(part["lam"]))
    set_weights(feedback, {"linear.weight": P, "linear.bias": b})


def prepare(
    model,
    batch: Batch,
    key: Sequence[int],
    training: bool = False,
    progress: float = 0.0,
    decoding: bool = False,
) -> dict[str, torch.Tensor]:
    """What the model's rule needs for a batch beside its states; empty for most rules.

    key: numbers that name the update; progress: share of the run that is done. decoding: rows that
    are sure may end their latents. See `coconut.feedback.prepare`.
    """
    feedback = model.feedback
    if feedback is None:
        return {}
    made = rules.prepare(feedback.rule, batch, feedback.width, key, training, progress)
    device = model.embedding.device
    arrays = {name: to_device(a, device) for name, a in made.items()}
    if feedback.rule.refresh is not None and batch.n_passes:
        arrays["inverse"] = feedback.inverses.of(model, training)
    if decoding and feedback.rule.stop:
        arrays["may_stop"] = torch.tensor(True)
    return arrays


class Thinker:
    """What a rule reads at the column before a latent, and the thought it makes of it.

    One for a forward pass: `watch` before each run of the trunk, `think` after it.
    """

    def __init__(self, model, prepared: dict[str, torch.Tensor] | None = None):
        self.model, self.prepared = model, prepared or {}
        self.feedback = model.feedback
        self.layers: dict[int, torch.Tensor] = {}
        """Raw h^l (B, D) of the layers that the rule wants."""
        self.latent = 0
        self.may_stop = "may_stop" in self.prepared
        self.has_stopped: torch.Tensor | None = None
        self._n_sure: torch.Tensor | None = None
        self._once = {name: a for name, a in self.prepared.items() if name == "inverse"}

    def watch(self, x: torch.Tensor, positions: torch.Tensor) -> Tap:
        """Begin a pass over inputs x (B, T, D); the tap keeps what the rule wants."""
        self.input, self._position = x[:, -1], positions[:, -1]
        self.layers = {}

        def tap(layer: int, h: torch.Tensor) -> None:
            if layer in self.feedback.wanted:
                self.layers[layer] = h[:, -1].clone()  # a view would keep all of h

        return tap

    def think(self, last: torch.Tensor, latent: int) -> torch.Tensor:
        """The thought (B, D) behind a column whose state after the final norm is `last`."""
        self.last, self.latent = last, latent
        self._logits: torch.Tensor | None = None
        rule = self.feedback.rule
        first, *others = (SOURCES[part.name](self, part) for part in rule.sources)
        a = sum(others, first)
        for part in rule.transforms:
            a = TRANSFORMS[part.name](self, part, a)
        if "noise" in self.prepared:
            scale = rms(a).detach()
            a = a + scale * self.prepared["noise"][latent]
        return a.to(last.dtype)

    def state(self, layer: int) -> torch.Tensor:
        """h^layer (B, D); h^0 without the position embedding, which the next input gets anew."""
        h = self.layers[layer]
        offset = self.model.position_embedding(self._position) if layer == 0 else None
        return h if offset is None else h - offset

    def weight(self, name: str) -> torch.Tensor:
        """A trained weight of the rule, by part.weight."""
        part, _, weight = name.partition(".")
        return self.feedback.get_submodule(part)[weight]

    def once(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value that all passes share."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    @property
    def rho(self) -> torch.Tensor:
        """Mean rms of an embedding row, without gradient."""
        return self.once("rho", lambda: rho(self.model))

    def logits(self, with_eos: bool = False) -> torch.Tensor:
        """float32 logits (B, V) of ĥ; markers, spare rows and eos are out of reach."""
        if self._logits is None:
            self._logits = at_least_float32(self.model.head(self.last))
        logits = self._logits

        def excluded() -> torch.Tensor:
            rows = self.feedback.setup.excluded(with_eos, logits.shape[-1])
            return to_device(rows.astype(bool), logits.device)

        return logits.masked_fill(self.once(f"excluded {with_eos}", excluded), NEVER)

    def note_entropy(self, logits: torch.Tensor, part: Part) -> None:
        """Count for how many latents a row has been sure; from `patience` on its latents end."""
        entropy = entropy_of(logits)
        if self._n_sure is None or self.has_stopped is None:
            self._n_sure = torch.zeros_like(entropy)
            self.has_stopped = torch.zeros_like(entropy, dtype=torch.bool)
        self._n_sure = (self._n_sure + 1) * (entropy < part["stop"])
        self.has_stopped = self.has_stopped | (self._n_sure >= part["patience"])


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats (...) of the distribution that float32 logits (..., V) stand for."""
    p = logits.softmax(dim=-1)
    return -(p * p.clamp(min=1e-30).log()).sum(dim=-1)


def rho(model) -> torch.Tensor:
    """Mean over the vocabulary of the rms of an embedding row, without gradient."""
    return rms(model.embedding.detach()).mean()


def at_least_float32(a: torch.Tensor) -> torch.Tensor:
    """bfloat16 as float32; float64 stays."""
    return a if a.dtype == torch.float64 else a.float()


def rms(a: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last axis, kept, in float32."""
    return at_least_float32(a).square().mean(dim=-1, keepdim=True).sqrt()


def normed(a: torch.Tensor) -> torch.Tensor:
    """a / max(rms(a), EPS), in float32; the gradient at 0 is finite."""
    a = at_least_float32(a)
    return a / a.square().mean(dim=-1, keepdim=True).clamp(min=EPS * EPS).sqrt()


# ---- sources: (thinker, part) -> (B, D)


def last(t: Thinker, part: Part) -> torch.Tensor:
    """ĥ, the state after the final norm: what the published checkpoints were trained on."""
    return t.last


def layer(t: Thinker, part: Part) -> torch.Tensor:
    """h^n, negative counts from the top."""
    return t.state(rules.layer_index(part["n"], t.feedback.n_layers))


def depth(t: Thinker, part: Part) -> torch.Tensor:
    """h^l at a share of the depth."""
    return t.state(rules.depth_index(part["f"], t.feedback.n_layers))


def hf(t: Thinker, part: Part) -> torch.Tensor:
    """Entry n of transformers' hidden_states, whose last is ĥ."""
    n = rules.hf_index(part["n"], t.feedback.n_layers)
    return t.last if n == t.feedback.n_layers else t.state(n)


def mean(t: Thinker, part: Part) -> torch.Tensor:
    """Weighted mean of several layers, uniform or softmax(alpha)."""
    first, end = rules.span_layers(part["layers"], t.feedback.n_layers)
    states = torch.stack([at_least_float32(t.state(n)) for n in range(first, end + 1)])
    if part["norm_each"]:
        states = normed(states)
    if not part["learned"]:
        return states.mean(dim=0)
    w = at_least_float32(t.weight("mean.alpha")).softmax(dim=0)
    return (w[:, None, None] * states).sum(dim=0)


def prev_input(t: Thinker, part: Part) -> torch.Tensor:
    """u_s: the input of the column itself, before any position embedding."""
    return t.input


def suppressed(t: Thinker, part: Part) -> torch.Tensor:
    """What layers take away, of the residual stream or of the logits."""
    pairs = rules.transitions(part, t.feedback.n_layers)
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


def over_threshold(drop: torch.Tensor, before: torch.Tensor, part: Part) -> torch.Tensor:
    """Where a drop counts: above the threshold, or among the k largest."""
    kind, x = part["threshold"]
    if kind == "topk":
        return (drop > 0) & (drop >= kth_largest(drop, int(x)))
    return drop > (x * rms(before) if kind == "rel" else x)


def kth_largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """(..., 1): the k-th largest entry of the last axis."""
    return a.topk(min(k, a.shape[-1]), dim=-1).values[..., -1:]


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

    return sum(fallen(n) for n in rules.fork_indices(part, n_layers))


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


def norm(a: torch.Tensor) -> torch.Tensor:
    """L2 norm over the last axis, kept, not below 1e-12."""
    return a.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt()


def largest(a: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k) of the k largest entries of a row, the largest first."""
    return a.detach().topk(min(k, a.shape[-1]), dim=-1).indices


def best(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token (B,) of each row."""
    return logits.argmax(dim=-1)


def token(t: Thinker, part: Part) -> torch.Tensor:
    """The embedding of <|latent|>."""
    return t.model.embedding[t.feedback.setup.markers[2]].expand_as(t.last)


def zero(t: Thinker, part: Part) -> torch.Tensor:
    """Nothing."""
    return torch.zeros_like(t.last)


def random(t: Thinker, part: Part) -> torch.Tensor:
    """One fixed random row at scale rho."""

    def drawn() -> torch.Tensor:
        return to_device(rules.random_row(part, t.feedback.width), t.last.device).to(t.last.dtype)

    row = t.once("row", drawn)
    return (row * t.rho).expand_as(t.last)


def shuffle(t: Thinker, part: Part) -> torch.Tensor:
    """ĥ of another row."""
    if "partners" not in t.prepared:
        raise ValueError("shuffle: give latent_forward what feedback.prepare made of the batch")
    return t.last[t.prepared["partners"][t.latent]]


# ---- transforms: (thinker, part, a (B, D)) -> (B, D)


def scaled(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """The direction of a at the scale of an embedding."""
    learned = part["scale"] == "learned"
    return normed(a) * (t.weight("rms.scale") if learned else t.rho)


def ln(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """LayerNorm or RMSNorm (the model's kind) without weights, times rho."""
    a = at_least_float32(a)
    of_model = t.model.norm_kind
    if (of_model if part["kind"] == "model" else part["kind"]) == "layer":
        a = a - a.mean(dim=-1, keepdim=True)
    return a * (a.square().mean(dim=-1, keepdim=True) + rules.LN_EPS).rsqrt() * t.rho


def final_norm(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """The model's own norm before the head."""
    return t.model.final_norm(a)


def linear(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """P a + b."""
    return F.linear(a, t.weight("linear.weight"), t.weight("linear.bias"))


def mlp(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """A residual block: a + W2 phi(W1 norm(a) + b1) + b2, normed again if asked."""
    inner = normed(a) * t.weight("mlp.norm_in")
    inner = F.linear(inner, t.weight("mlp.w1"), t.weight("mlp.b1"))
    a = a + F.linear(activation(part, inner), t.weight("mlp.w2"), t.weight("mlp.b2"))
    return normed(a) * t.weight("mlp.norm_out") if part["norm_out"] else a


def mlp_plain(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """norm(W2 phi(W1 a)): a projection head as published, without the residual."""
    inner = activation(part, F.linear(a, t.weight("mlp_plain.w1")))
    if "kept" in t.prepared:
        inner = inner * t.prepared["kept"][t.latent].to(inner.dtype)
    return normed(F.linear(inner, t.weight("mlp_plain.w2"))) * t.weight("mlp_plain.norm")


def activation(part: Part, a: torch.Tensor) -> torch.Tensor:
    """GELU or SiLU."""
    return F.gelu(a) if part["phi"] == "gelu" else F.silu(a)


def gate(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """g a + (1 - g) E[argmax], g read off ĥ."""
    raw = F.linear(t.last, t.weight("gate.weight"), t.weight("gate.bias"))
    g = at_least_float32(raw).sigmoid()
    return g * a + (1 - g) * t.model.embedding[best(t.logits())]


def detach(t: Thinker, part: Part, a: torch.Tensor) -> torch.Tensor:
    """A constant: no gradient through time."""
    return a.detach()


SOURCES: dict[str, Callable[[Thinker, Part], torch.Tensor]] = {
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
TRANSFORMS: dict[str, Callable[[Thinker, Part, torch.Tensor], torch.Tensor]] = {
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
