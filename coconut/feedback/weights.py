"""A rule on a model: its setup, and the shapes and first values of its trained weights."""

import math
import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coconut.feedback.catalogue import Part
from coconut.feedback.layers import span_layers
from coconut.feedback.rules import Rule

RULE_PREFIX = "feedback."
"""Of a rule's weights among the model's parameters."""


# ---- a rule in a run


@dataclass(frozen=True)
class Setup:
    """A rule and what it must know of the vocabulary.

    markers: ids of start, end and latent. n_tokens: ids below are tokens, rows beyond are spare.
    is_trained: its weights come with the checkpoint.
    """

    rule: Rule
    markers: tuple[int, int, int]
    eos_id: int
    n_tokens: int
    is_trained: bool = False

    def problems(self, n_layers: int, n_rows: int) -> list[str]:
        """What keeps the rule from running on a model of L layers with n_rows embeddings."""
        found = []
        try:
            self.rule.layers(n_layers)
        except ValueError as error:
            found.append(f"feedback {self.rule}: {error}")
        ids = [*self.markers, self.eos_id]
        if any(not 0 <= i < n_rows for i in ids):
            found.append(
                f"feedback {self.rule}: the markers and eos are tokens {ids}, but the embedding"
                f" has {n_rows} rows; give the tokenizer the model was trained with"
            )
        return found

    def excluded(self, with_eos: bool, n_rows: int) -> np.ndarray:
        """(V,) bool: rows that no thought is mixed from, which are markers, spare rows, eos."""
        out = np.zeros(n_rows, bool)
        out[self.n_tokens :] = True
        out[list(self.markers)] = True
        if not with_eos:
            out[self.eos_id] = True
        return out


def shapes(rule: Rule, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the rule's trained weights, without the prefix `feedback.`."""
    return {name: w.shape for name, w in initial_weights(rule, n_layers, width, 1.0, 0).items()}


def initial_weights(
    rule: Rule, n_layers: int, width: int, rho: float, seed: int
) -> dict[str, np.ndarray]:
    """float32 weights of a rule before training; rho: mean rms of an embedding row.

    Each has a stream of its own, made from its name and the seed. linear with init=ridge starts as
    the identity and is fitted before the first update.
    """
    out: dict[str, np.ndarray] = {}

    def normal(name: str, rows: int, columns: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(f"feedback.{name}".encode())])
        return rng.standard_normal((rows, columns))

    for part in rule.parts:
        if part.name == "mean" and part["learned"]:
            first, last = span_layers(part["layers"], n_layers)
            out["mean.alpha"] = np.zeros(last - first + 1)
        elif part.name == "rms" and part["scale"] == "learned":
            out["rms.scale"] = np.full(1, rho)
        elif part.name == "linear":
            out["linear.weight"] = np.eye(width)
            if part["init"] == "orthogonal":
                q, r = np.linalg.qr(normal("linear.weight", width, width))
                out["linear.weight"] = q * np.sign(np.diag(r))
            out["linear.bias"] = np.zeros(width)
        elif part.name == "mlp":
            hidden = part["hidden"] or 2 * width
            out["mlp.norm_in"] = np.ones(width)
            out["mlp.w1"] = normal("mlp.w1", hidden, width) / math.sqrt(width)
            out["mlp.b1"] = np.zeros(hidden)
            out["mlp.w2"] = np.zeros((width, hidden))
            out["mlp.b2"] = np.zeros(width)
            if part["norm_out"]:
                out["mlp.norm_out"] = np.full(width, rho)
        elif part.name == "mlp_plain":
            hidden = part["hidden"]
            out["mlp_plain.w1"] = normal("mlp_plain.w1", hidden, width) / math.sqrt(width)
            out["mlp_plain.w2"] = normal("mlp_plain.w2", width, hidden) / math.sqrt(hidden)
            out["mlp_plain.norm"] = np.full(width, rho)
        elif part.name == "gate":
            rows = width if part["vector"] else 1
            out["gate.weight"] = np.zeros((rows, width))
            out["gate.bias"] = np.full(rows, part["c"])
    return {name: w.astype(np.float32) for name, w in out.items()}


def random_row(part: Part, width: int) -> np.ndarray:
    """The fixed row (D,) of `random`, with rms 1."""
    row = np.random.default_rng([part["seed"], zlib.crc32(b"feedback.random")]).standard_normal(
        width
    )
    return (row / math.sqrt((row**2).mean())).astype(np.float32)


def inverse_gram(gram: np.ndarray, lam: float) -> np.ndarray:
    """(WᵀW + λI)⁻¹ in float64 from WᵀW (d, d), λ being lam times the mean of its diagonal."""
    gram = gram.astype(np.float64)
    return np.linalg.inv(gram + lam * np.trace(gram) / len(gram) * np.eye(len(gram)))


class Inverses:
    """The inverse of WᵀW that `suppressed` needs, kept for one model and one state of it.

    make: (model, λ) -> (WᵀW + λI)⁻¹ (D, D) of its head, an array of the twin's.
    """

    def __init__(self, rule: Rule, make: Callable[[Any, float], Any]):
        self.rule, self.make = rule, make
        self._kept: dict[bool, tuple[Any, int, Any]] = {}

    def of(self, model: Any, training: bool = False) -> Any:
        """That of this model, anew when the one kept is too old.

        In training it may be `refresh` updates old, otherwise it is of the present parameters.
        """
        refresh = self.rule.refresh if training else 1
        version = model.feedback.version
        owner, made_at, inverse = self._kept.get(training, (None, 0, None))
        if inverse is not None and owner() is model:
            if not refresh or 0 <= version - made_at < refresh:
                return inverse
        part = self.rule.find("suppressed")
        assert part is not None, "only asked for by it"
        inverse = self.make(model, part["lam"])
        # Training and the rest apart: an evaluation in between must not change a run.
        self._kept[training] = (weakref.ref(model), version, inverse)
        return inverse

    def forget(self) -> None:
        """Make them anew at the next use, as a resumed run does."""
        self._kept = {}


class RidgeSums:
    """Sums over tokens of ordinary text, from which `linear` is fitted in closed form."""

    def __init__(self, width: int):
        self.n = 0
        self.h, self.e = np.zeros(width), np.zeros(width)
        self.hh, self.eh = np.zeros((width, width)), np.zeros((width, width))

    def add(self, mask: np.ndarray, h: np.ndarray, e: np.ndarray) -> None:
        """mask (B, T): real tokens; h (B, T, D): their ĥ; e (B, T, D): their embeddings."""
        has_next = mask[:, :-1] & mask[:, 1:]
        h, e = (a[has_next].astype(np.float64) for a in (h[:, :-1], e[:, 1:]))
        self.n += len(h)
        self.h += h.sum(axis=0)
        self.e += e.sum(axis=0)
        self.hh += h.T @ h
        self.eh += e.T @ h

    def solve(self, lam: float) -> dict[str, np.ndarray]:
        """P and b, by name, that minimise the sum of ‖P h + b - e‖² plus lam ‖P‖².

        h: ĥ of a token, e: the embedding of the token behind it.
        """
        n = max(self.n, 1)
        hh = self.hh - np.outer(self.h, self.h) / n
        eh = self.eh - np.outer(self.e, self.h) / n
        P = np.linalg.solve(hh + lam * np.eye(len(hh)), eh.T).T
        b = (self.e - P @ self.h) / n
        return {"linear.weight": P.astype(np.float32), "linear.bias": b.astype(np.float32)}
