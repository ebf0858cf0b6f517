"""This code as a contender, and the published way of decoding over the same model.

`python -m bench.ours TASK WORKLOAD.json BATCH_SIZE REPEATS`; prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.workload import Workload, peak_rss
from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding
from mlx_coconut import blas
from mlx_coconut.models import weights
from mlx_coconut.models.base import additive_mask
from mlx_coconut.thoughts.generate import generate
from mlx_coconut.thoughts.latent import Inputs, latent_forward
from mlx_coconut.updates.train import Trainer

import mlx.core as mx  # isort: skip  (the package loads the BLAS first)


def decode(workload: Workload, batches: list[Batch], one: Callable) -> dict[str, Any]:
    """Ids of every row, and seconds for all batches."""
    model, _, _ = weights.load_model(Path(workload.model))
    ids: list[list[int]] = [[]] * len(workload.rows)
    start = time.perf_counter()
    for batch in batches:
        for i, new in zip(batch.idx, one(model, batch, workload), strict=True):
            ids[i] = new
    return {"seconds": [time.perf_counter() - start], "ids": ids}


def batched(model, batch: Batch, workload: Workload) -> list[list[int]]:
    """Ours: a cache from the question to the last token, finished rows leave."""
    decoding = Decoding(workload.max_new_tokens, workload.eos_id)
    return generate(model, batch, batch.n_passes, decoding)


def published(model, batch: Batch, workload: Workload) -> list[list[int]]:
    """As released: one question; after the latent passes the whole prefix again for each token,
    logits at every position."""
    state = latent_forward(model, Inputs.of(batch), batch.first_latent, batch.n_passes)
    x = model.embed(mx.array(batch.ids))
    for i, thought in enumerate(state.thoughts):
        x[:, batch.first_latent + i] = thought
    logits = model.head(state.hidden)
    out: list[int] = []
    while True:
        out.append(mx.argmax(logits[0, -1]).item())
        if out[-1] == workload.eos_id or len(out) == workload.max_new_tokens:
            return [out]
        x = mx.concatenate([x, model.embed(mx.array([[out[-1]]]))], axis=1)
        T = x.shape[1]
        mask = additive_mask(mx.ones((1, T), mx.bool_), 0, T, x.dtype)
        logits = model.head(model.trunk(x, mx.arange(T)[None], mask))


def train(workload: Workload, batch: Batch, repeats: int, checkpointing: bool) -> dict[str, Any]:
    """Losses of the first updates, and seconds of each; the first one traces."""
    model, _, _ = weights.load_model(Path(workload.model))
    trainer = Trainer(model, weight_decay=0.01, checkpointing=checkpointing)
    losses, seconds = [], []
    for number in range(repeats + 1):
        start = time.perf_counter()
        losses.append(trainer.step([batch], 1e-4, (0, number)).loss)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "losses": losses}


def main() -> None:
    task, file, size, repeats = sys.argv[1:]
    workload = Workload.load(file)
    batches = workload.batches(int(size))
    if task == "decode":
        result = decode(workload, batches, batched)
    elif task == "published":
        result = decode(workload, batches, published)
    else:
        result = train(workload, batches[0], int(repeats), checkpointing=task == "checkpointed")
    result["mlx_peak_bytes"] = mx.get_peak_memory()
    result["rss_peak_bytes"] = peak_rss()
    result["versions"] = f"mlx {mx.__version__}, {blas.STATUS}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
