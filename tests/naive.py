"""Slow oracle: GPT-2 with latents in numpy, float64, one row, no batch, no cache, no padding.

Everything is run again for every latent and every new token, as the published code does. Written
from the definitions, so that it shares nothing with what it judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class GPT2:
    """GPT-2 from Hugging Face names and layout: weights (in, out), y = x W + b."""

    def __init__(self, weights: dict[str, np.ndarray], n_head: int, eps: float = 1e-5):
        self.weights = {
            name.removeprefix("transformer."): w.astype(np.float64) for name, w in weights.items()
        }
        self.n_head, self.eps = n_head, eps
        self.n_layer = sum(name.endswith("ln_1.weight") for name in self.weights)

    @classmethod
    def load(cls, directory: Path) -> GPT2:
        """The model of a checkpoint directory."""
        config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        return cls(weights, config["n_head"], config["layer_norm_epsilon"])

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Token embeddings without positions (T, D)."""
        return self.weights["wte.weight"][np.array(ids)]

    def trunk(self, x: np.ndarray) -> np.ndarray:
        """x (T, D), input embeddings without positions -> states after the final norm (T, D)."""
        x = x + self.weights["wpe.weight"][: len(x)]
        for i in range(self.n_layer):
            x = x + self._attention(f"h.{i}.attn", self._norm(f"h.{i}.ln_1", x))
            inner = self._linear(f"h.{i}.mlp.c_fc", self._norm(f"h.{i}.ln_2", x))
            x = x + self._linear(f"h.{i}.mlp.c_proj", gelu_new(inner))
        return self._norm("ln_f", x)

    def head(self, h: np.ndarray) -> np.ndarray:
        """Logits by the tied head: (T, D) -> (T, V)."""
        return h @ self.weights["wte.weight"].T

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        T, D = x.shape
        q, k, v = np.split(self._linear(f"{name}.c_attn", x), 3, axis=1)
        future = np.triu(np.ones((T, T), bool), 1)
        out = np.empty_like(x)
        for part in np.split(np.arange(D), self.n_head):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
            scores[future] = -np.inf
            out[:, part] = softmax(scores) @ v[:, part]
        return self._linear(f"{name}.c_proj", out)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + self.eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def inputs_with_thoughts(
    model: GPT2, ids: Sequence[int], latent: int | None, given: np.ndarray | None = None
) -> np.ndarray:
    """Input embeddings (T, D) with each latent's replaced by the state before it, in order.

    latent: the token that is replaced; None gives the plain model. given (n, D): thoughts to put
    there instead of the states.
    """
    x = model.embed(ids)
    for i, p in enumerate(p for p, token in enumerate(ids) if token == latent):
        x[p] = model.trunk(x[:p])[-1] if given is None else given[i]
    return x


def logits(model: GPT2, ids: Sequence[int], latent: int | None) -> np.ndarray:
    """Logits (T, V) of one row."""
    return model.head(model.trunk(inputs_with_thoughts(model, ids, latent)))


def loss_sum(
    model: GPT2, ids: Sequence[int], labels: Sequence[int], latent: int | None
) -> tuple[float, int]:
    """(summed cross-entropy in nats, targets) of one row; a label counts unless it is -100."""
    where = [t for t in range(1, len(ids)) if labels[t] != -100]
    p = softmax(logits(model, ids, latent))
    return -sum(math.log(p[t - 1, labels[t]]) for t in where), len(where)


def generate(
    model: GPT2,
    ids: Sequence[int],
    latent: int | None,
    eos_id: int,
    max_new_tokens: int,
    given: np.ndarray | None = None,
) -> list[int]:
    """Greedy new tokens, each from a run over everything before it; the eos that ends it is kept.

    A latent token that the model writes itself is an ordinary token: only the prompt's are thought.
    """
    new: list[int] = []
    x = inputs_with_thoughts(model, ids, latent, given)
    while len(new) < max_new_tokens and eos_id not in new:
        new.append(int(np.argmax(model.head(model.trunk(x)[-1:]))))
        x = np.concatenate([x, model.embed(new[-1:])])
    return new


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu_new(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
