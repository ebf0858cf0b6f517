"""Sampling rationales: this code in both twins, and a plain loop with transformers' `generate`.

`python -m bench.rollouts CONTENDER WORKLOAD.json ROWS REPEATS`; prints one line of JSON. ROWS:
sequences sampled at a time; the plain loop takes those of one prompt, as the released code does.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.workload import Workload, peak_rss
from coconut.batches.batch import collate
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding

SMALL = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "n_ctx": 256}
"""What makes GPT-2 small a small model: 5 M parameters with a vocabulary of 8,192."""
VOCABULARY = 8192
CONTENDERS = ("mlx_coconut", "cuda_coconut", "transformers", "one by one")


def prompts(n: int, n_samples: int, n_new: int) -> Workload:
    """Prompts of 48 to 96 tokens, as long as GSM8K's; no token ends a row."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(VOCABULARY, size=rng.integers(48, 97)).tolist() for _ in range(n)]
    return Workload("", rows, -1, -1, n_new, n_samples=n_samples)


def ours(twin: str, workload: Workload, size: int) -> tuple[Callable[[int], Any], str]:
    """(sample all rows by a seed -> (ids, log-probabilities of the rows)), versions."""
    if twin == "mlx_coconut":
        blas = importlib.import_module("mlx_coconut.blas")  # before mlx
        versions = f"mlx {importlib.import_module('mlx.core').__version__}, {blas.STATUS}"
    else:
        importlib.import_module(
            "cuda_coconut.models.cpu"
        ).keep_freed_memory()  # as its back end does
        versions = _torch_versions()
    sample = importlib.import_module(f"{twin}.thoughts.generate").sample
    model, _, _ = importlib.import_module(f"{twin}.models.weights").load_model(Path(workload.model))
    source = np.repeat(np.arange(len(workload.rows)), workload.n_samples)

    def run(seed: int) -> tuple[list[list[int]], list[float]]:
        decoding = Decoding(workload.max_new_tokens, workload.eos_id, 1.0, seed)
        ids, logprobs = [], []
        for start in range(0, len(source), size):
            part = source[start : start + size]
            used = np.unique(part)
            batch = collate([Row(i, workload.rows[i], None, -1, 0) for i in used], 0)
            streams = [(start + i,) for i in range(len(part))]
            found = sample(model, batch, 0, decoding, np.searchsorted(used, part), streams)
            ids += [row.tokens for row in found]
            logprobs += [float(np.sum(row.logprobs)) for row in found]
        return ids, logprobs

    return run, versions


def plain(workload: Workload, size: int) -> tuple[Callable[[int], Any], str]:
    """The same of a prompt at a time, its samples `size` at a time, by `generate`."""
    import torch

    model = _transformers(workload)

    @torch.no_grad()
    def run(seed: int) -> tuple[list[list[int]], list[float]]:
        torch.manual_seed(seed)
        ids = []
        for row in workload.rows:
            prompt = torch.tensor([row])
            for _ in range(0, workload.n_samples, size):
                out = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=size,
                    max_new_tokens=workload.max_new_tokens,
                    pad_token_id=0,
                )
                ids += out[:, len(row) :].tolist()
        return ids, []

    return run, _torch_versions()


def score(workload: Workload) -> list[float]:
    """transformers' own log-probability of each row's last n_targets tokens."""
    import torch

    model, n = _transformers(workload), workload.n_targets
    found = []
    for row in workload.rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(dim=-1)
        found.append(logprobs[-n:].gather(1, ids[0, -n:, None]).double().sum().item())
    return found


def _transformers(workload: Workload) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(workload.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as long as ours
    return model.eval()


def _torch_versions() -> str:
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    contender, file, size, repeats = sys.argv[1:]
    workload = Workload.load(file)
    if contender == "score":
        print(json.dumps({"logprobs": score(workload), "versions": _torch_versions()}))
        return
    if contender.endswith("_coconut"):
        run, versions = ours(contender, workload, int(size))
    else:
        run, versions = plain(workload, int(size))
    run(0)  # traces, and fills what is kept
    seconds, of_cores = [], []
    for seed in range(1, int(repeats) + 1):
        start, start_of_cores = time.perf_counter(), time.process_time()
        ids, logprobs = run(seed)
        seconds.append(time.perf_counter() - start)
        of_cores.append(time.process_time() - start_of_cores)
    result = {"seconds": seconds, "core_seconds": of_cores, "ids": ids, "logprobs": logprobs}
    print(json.dumps(result | {"rss_peak_bytes": peak_rss(), "versions": versions}))


if __name__ == "__main__":
    main()
