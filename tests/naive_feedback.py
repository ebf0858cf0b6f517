"""Slow oracle of the feedback rules: numpy, float64, one row, everything run again for each latent.

Written from docs/feedback.md's formulas. What counts as a constant in a gradient (masks, scales,
inverses) goes through `held`, so that finite differences can keep it where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import naive
import numpy as np

from coconut.feedback.weights import Setup


class Thinker:
    """A rule on naive.GPT2. own: its weights by name; noise (R, D) and kept (R, H): its draws."""

    def __init__(self, model: naive.GPT2, setup: Setup, own: dict, noise=None, kept=None):
        self.model, self.setup, self.rule = model, setup, setup.rule
        self.own = {name: w.astype(np.float64) for name, w in own.items()}
        self.noise, self.kept_units, self.number = noise, kept, 0
        self.record: list | None = None
        self.replay: list | None = None

    def held(self, value):
        """The value; when constants are replayed, what it was when they were recorded."""
        if self.replay is not None:
            return self.replay.pop(0)
        if self.record is not None:
            self.record.append(value)
        return value

    def inputs(self, ids: Sequence[int], latent: int) -> np.ndarray:
        """Input embeddings (T, D) with each latent's replaced by its thought, in order."""
        x = self.model.embed(ids)
        for i, p in enumerate(p for p, token in enumerate(ids) if token == latent):
            x[p] = self.think(x[:p], i)
        return x

    def think(self, x: np.ndarray, i: int) -> np.ndarray:
        m, self.number = self.model, i
        h = x + m.weights["wpe.weight"][: len(x)]
        states = [h[-1]]
        for n in range(m.n_layer):
            h = h + m._attention(f"h.{n}.attn", m._norm(f"h.{n}.ln_1", h))
            inner = m._linear(f"h.{n}.mlp.c_fc", m._norm(f"h.{n}.ln_2", h))
            h = h + m._linear(f"h.{n}.mlp.c_proj", naive.gelu_new(inner))
            states.append(h[-1])
        self.L, self.states, self.u = m.n_layer, states, x[-1]
        self.wpe = m.weights["wpe.weight"][len(x) - 1]
        self.last = self.lens(states[-1])
        self.E = m.weights["wte.weight"]
        a = sum(getattr(self, f"source_{part.name}")(part) for part in self.rule.sources)
        for part in self.rule.transforms:
            a = getattr(self, f"to_{part.name}")(part, a)
        if self.noise is not None:
            a = a + self.held(rms(a)) * self.noise[i]
        return a

    def lens(self, h):
        return self.model._norm("ln_f", h[None])[0]

    def state(self, n):
        return self.states[n] - (self.wpe if n == 0 else 0)

    def rho(self):
        return self.held(np.mean([rms(row) for row in self.E]))

    def logits(self, eos=False):
        z = self.E @ self.last
        z[list(self.setup.markers) + ([] if eos else [self.setup.eos_id])] = -1e9
        z[self.setup.n_tokens :] = -1e9
        return z

    def source_last(self, part):
        return self.last

    def source_layer(self, part):
        n = part["n"]
        return self.state(n if n >= 0 else self.L + 1 + n)

    def source_depth(self, part):
        return self.state(math.floor(part["f"] * self.L + 0.5))

    def source_hf(self, part):
        n = part["n"]
        n = int(n * (self.L + 1)) if isinstance(n, float) else n % (self.L + 1)
        return self.last if n == self.L else self.state(n)

    def span(self, part):
        def layer(n):
            return math.floor(n * self.L) if isinstance(n, float) else n % (self.L + 1)

        start, stop = part["layers"]
        return layer(start), self.L if stop is None else layer(stop)

    def source_mean(self, part):
        a, b = self.span(part)
        states = [self.state(n) for n in range(a, b + 1)]
        if part["norm_each"]:
            states = [s / rms(s) for s in states]
        w = np.full(len(states), 1 / len(states))
        if part["learned"]:
            w = naive.softmax(self.own["mean.alpha"])
        return sum(wi * s for wi, s in zip(w, states, strict=True))

    def source_prev_input(self, part):
        return self.u

    def source_suppressed(self, part):
        a, b = self.span(part)
        pairs = [(a, b)] if part["agg"] == "net" else [(n, n + 1) for n in range(a, b)]
        one = self.vocab if part["space"] == "vocab" else self.residual
        total = sum(one(part, self.states[i], self.states[j]) for i, j in pairs)
        return total / len(pairs) if part["agg"] == "mean" else total

    def over(self, part, drop, before):
        kind, x = part["threshold"]
        if kind == "topk":
            return (drop > 0) & (np.argsort(np.argsort(-drop)) < x)
        return drop > (x * rms(before) if kind == "rel" else x)

    def residual(self, part, a, b):
        drop = a - b if part["sign"] == "signed" else abs(a) - abs(b)
        mask = self.held(self.over(part, drop, a))
        return mask * {"removed": a - b, "before": a, "after": b}[part["value"]]

    def vocab(self, part, a, b):
        W = self.E
        if part["subset"]:
            W = W[self.held(np.argsort(-(W @ self.last))[: part["subset"]])]
        za, zb = W @ self.lens(a), W @ self.lens(b)
        kind, x = part["threshold"]
        tau = 0 if kind == "topk" else x if kind == "abs" else self.held(x * rms(za))
        r = self.held(self.over(part, za - zb, za)) * (za - zb - tau)
        if part["tokens"]:
            r = r * self.held(np.argsort(np.argsort(-r)) < part["tokens"])
        r = r - r.mean()
        gram = W.T @ W
        loaded = gram + part["lam"] * np.trace(gram) / len(gram) * np.eye(len(gram))
        return self.held(np.linalg.inv(loaded)) @ (W.T @ r)

    def source_suppressed_fork(self, part):
        H = [*self.states[:-1], self.last]
        where = part["from"]
        if isinstance(where, float):
            where = range(int(where * len(H)), self.L)
        else:
            where = [where % self.L]
        return sum(self.held(H[n + 1] - H[n] < -part["threshold"]) * H[n + 1] for n in where)

    def source_soft(self, part):
        z = self.logits(part["eos"]) / part["tau"]
        keep = self.held(self.kept(part, z))
        p = naive.softmax(np.where(keep, z, -np.inf))
        mixed = p @ self.E
        if part["renorm"]:
            mixed = mixed * (p @ np.linalg.norm(self.E, axis=1)) / np.linalg.norm(mixed)
        return self.E[np.argmax(z)] if part["straight_through"] else mixed

    def kept(self, part, z):
        order = np.argsort(-z)
        keep = np.zeros(len(z), bool)
        keep[order[: part["topk"] or None]] = True
        p = naive.softmax(np.where(keep, z, -np.inf))[order]
        return keep & (np.argsort(order) < (np.cumsum(p) - p < part["topp"]).sum())

    def source_token(self, part):
        return self.E[self.setup.markers[2]]

    def source_zero(self, part):
        return 0 * self.last

    def source_random(self, part):
        from coconut.feedback.weights import random_row

        return self.rho() * random_row(part, len(self.last)).astype(np.float64)

    def to_rms(self, part, a):
        scale = self.own["rms.scale"] if part["scale"] == "learned" else self.rho()
        return scale * a / max(rms(a), 1e-6)

    def to_ln(self, part, a):
        if part["kind"] in ("model", "layer"):  # GPT-2's is a LayerNorm
            a = a - a.mean()
        return self.rho() * a / math.sqrt((a**2).mean() + 1e-5)

    def to_final_norm(self, part, a):
        return self.lens(a)

    def to_linear(self, part, a):
        return self.own["linear.weight"] @ a + self.own["linear.bias"]

    def to_mlp(self, part, a):
        own = {n.removeprefix("mlp."): w for n, w in self.own.items()}
        inner = own["w1"] @ (own["norm_in"] * a / rms(a)) + own["b1"]
        a = a + own["w2"] @ activation(part, inner) + own["b2"]
        return own["norm_out"] * a / rms(a) if part["norm_out"] else a

    def to_mlp_plain(self, part, a):
        inner = activation(part, self.own["mlp_plain.w1"] @ a)
        if self.kept_units is not None:
            inner = inner * self.kept_units[self.number]
        a = self.own["mlp_plain.w2"] @ inner
        return self.own["mlp_plain.norm"] * a / rms(a)

    def to_gate(self, part, a):
        g = 1 / (1 + np.exp(-(self.own["gate.weight"] @ self.last + self.own["gate.bias"])))
        return g * a + (1 - g) * self.E[self.held(np.argmax(self.logits()))]

    def to_detach(self, part, a):
        return self.held(a.copy())


def rms(a):
    return math.sqrt((a**2).mean())


def activation(part, a):
    if part["phi"] == "silu":
        return a / (1 + np.exp(-a))
    return np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in a])


def logits(thinker: Thinker, ids: Sequence[int], latent: int) -> np.ndarray:
    """Logits (T, V) of one row."""
    return thinker.model.head(thinker.model.trunk(thinker.inputs(ids, latent)))


def loss_sum(thinker: Thinker, ids, labels, latent) -> float:
    """Summed cross-entropy of one row's labels."""
    p = naive.softmax(logits(thinker, ids, latent))
    return -sum(math.log(p[t - 1, labels[t]]) for t in range(1, len(ids)) if labels[t] != -100)
