"""Golden models and batches, and one face over both twins: numpy in, numpy out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from coconut.batches.batch import Batch, collate
from coconut.batches.curriculum import IGNORED, Row

GOLDEN = Path(__file__).parent / "golden"
MODELS = GOLDEN / "models"
TOKENS = json.loads((GOLDEN / "cases.json").read_text())["tokens"]


@cache
def golden(name: str) -> Any:
    """The content of a golden JSON file, named without its ending."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_batch(inputs: dict[str, list]) -> Batch:
    """A golden batch as our own collator makes it from the unpadded rows; the layouts must agree.

    inputs: input_ids, attention_mask, labels, position_ids, as nested lists.
    """
    rows = []
    mask = np.array(inputs["attention_mask"], bool)
    for i, real in enumerate(mask):
        ids = np.array(inputs["input_ids"][i])[real].tolist()
        labels = np.array(inputs["labels"][i])[real].tolist()
        rows.append(as_row(i, ids, labels))
    batch = collate(rows, pad_id=TOKENS["eos"])
    for ours, theirs in (
        (batch.ids, "input_ids"),
        (batch.mask, "attention_mask"),
        (batch.labels, "labels"),
        (batch.positions, "position_ids"),
    ):
        np.testing.assert_array_equal(ours, np.array(inputs[theirs]))
    return batch


def as_row(idx: int, ids: list[int], labels: list[int] | None) -> Row:
    """A row whose latents are found by their token."""
    latents = [i for i, token in enumerate(ids) if token == TOKENS["latent"]]
    return Row(idx, ids, labels, latents[0] if latents else -1, len(latents))


def ragged_batch(seed: int, latents: tuple[int, ...] = (0, 1, 3, 2), vocab: int = 200) -> Batch:
    """Random rows of different lengths with these numbers of latents."""
    rng = np.random.default_rng(seed)
    rows = []
    words = np.setdiff1d(np.arange(vocab), list(TOKENS.values()))
    for idx, n in enumerate(latents):
        question = rng.choice(words, rng.integers(3, 12)).tolist()
        thoughts = [TOKENS["start"], *[TOKENS["latent"]] * n, TOKENS["end"]]
        answer = [*rng.choice(words, rng.integers(1, 9)).tolist(), TOKENS["eos"]]
        labels = [IGNORED] * (len(question) + len(thoughts)) + answer
        rows.append(as_row(idx, question + thoughts + answer, labels))
    return collate(rows, pad_id=TOKENS["eos"])


@dataclass
class Outputs:
    """What a model computes of a batch. grads: by Hugging Face name, in Hugging Face layout."""

    loss: float
    logits: np.ndarray
    thoughts: list[np.ndarray]
    grads: dict[str, np.ndarray]


def run_model(
    twin: ModuleType, name: str, batch: Batch, n_passes: int | None = None, **options: Any
) -> Outputs:
    """Mean loss, all logits, thoughts and gradients of the mean loss of a golden model.

    options: key and checkpointing, as `latent_forward` takes them.
    """
    model, module, _ = twin.weights.load_model(MODELS / name)
    plan = (batch.first_latent, batch.n_passes if n_passes is None else n_passes)
    kept = {}

    def mean_loss(model):
        array = mlx_array if twin.__name__ == "mlx_coconut" else torch_array
        out = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), *plan, **options)
        kept.update(logits=model.head(out.hidden), thoughts=out.thoughts)
        hidden = out.hidden.reshape(-1, out.hidden.shape[-1])[array(batch.target_index)]
        loss, count = twin.losses.masked_cross_entropy(
            model.head(hidden), array(batch.target_ids), array(batch.target_weight)
        )
        return loss / count

    run = mlx_gradients if twin.__name__ == "mlx_coconut" else torch_gradients
    loss, grads = run(model, mean_loss)
    return Outputs(
        loss.item(),
        to_numpy(kept["logits"]),
        [to_numpy(t) for t in kept["thoughts"]],
        {n: to_numpy(g) for n, g in module.to_hf(grads).items()},
    )


def mlx_array(array: np.ndarray):
    import mlx.core as mx

    return mx.array(array)


def torch_array(array: np.ndarray):
    import torch

    return torch.from_numpy(array)


def mlx_gradients(model, mean_loss):
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    loss, grads = nn.value_and_grad(model, mean_loss)(model)
    return loss, dict(tree_flatten(grads))


def torch_gradients(model, mean_loss):
    loss = mean_loss(model)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def to_numpy(array) -> np.ndarray:
    """An array of either framework on the host."""
    return array.detach().numpy() if hasattr(array, "detach") else np.array(array)
