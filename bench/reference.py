"""The same work written plainly with transformers and torch.

`python -m bench.reference TASK WORKLOAD.json BATCH_SIZE REPEATS [DTYPE]`; prints one line of JSON.
Without DTYPE in float32 on the CPU, with it on the machine's GPU where it has one.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from bench.workload import Workload, peak_rss
from coconut.batches.batch import Batch
from coconut.batches.curriculum import IGNORED

_ACCEPTED = inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
CACHE = "cache" if "cache" in _ACCEPTED else "past_key_values"
"""What transformers calls the keys and values, from 5.24 on and before."""


def latent_passes(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits at every position, inputs with thoughts in place, and the keys and values.

    One forward call for each latent, over the columns that are new, with the cache.
    """
    ids, mask, positions = (
        torch.from_numpy(a).long().to(model.device)
        for a in (batch.ids, batch.mask, batch.positions)
    )
    embedded = model.get_input_embeddings()(ids)
    inputs, logits, cache, thought = [], [], None, None
    first, last = batch.first_latent, batch.first_latent + batch.n_passes - 1
    edges = [0, *range(first, last + 1), ids.shape[1]] if batch.n_passes else [0, ids.shape[1]]
    for start, end in pairwise(edges):
        x = embedded[:, start:end]
        if thought is not None:
            x = torch.cat([thought[:, None], x[:, 1:]], dim=1)
        out = model(
            inputs_embeds=x,
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            use_cache=True,
            output_hidden_states=True,
            **{CACHE: cache},
        )
        cache, thought = out[CACHE], out.hidden_states[-1][:, -1]
        inputs.append(x)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), torch.cat(inputs, dim=1), cache


@torch.no_grad()
def decode(model, workload: Workload, batches: list[Batch]) -> dict[str, Any]:
    """Ids of every row by `generate` over the latent passes' cache, and seconds for all batches."""
    ids: list[list[int]] = [[]] * len(workload.rows)
    start = time.perf_counter()
    for batch in batches:
        logits, _, cache = latent_passes(model, batch)
        first = logits[:, -1].argmax(-1, keepdim=True)
        read, mask = (torch.from_numpy(a).long().to(first.device) for a in (batch.ids, batch.mask))
        prompt = torch.cat([read, first], dim=1)
        mask = torch.cat([mask, torch.ones_like(first)], dim=1)
        out = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=workload.max_new_tokens - 1,
            do_sample=False,
            eos_token_id=workload.eos_id,
            pad_token_id=workload.eos_id,
            **{CACHE: cache},
        )
        for i, row in zip(batch.idx, out[:, batch.ids.shape[1] :].tolist(), strict=True):
            end = row.index(workload.eos_id) + 1 if workload.eos_id in row else len(row)
            ids[i] = row[:end]
    return {"seconds": [time.perf_counter() - start], "ids": ids}


def train(model, batch: Batch, repeats: int, bf16: bool = False) -> dict[str, Any]:
    """Losses of the first updates, and seconds of each; bf16: by autocast over float32 weights."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    labels = torch.from_numpy(batch.labels).long().to(model.device)
    losses, seconds = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits, _, _ = latent_passes(model, batch)
            loss = F.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]),
                labels[:, 1:].reshape(-1),
                ignore_index=IGNORED,
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del logits, loss
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "losses": losses}


def run(task: str, workload: Workload, size: int, repeats: int, dtype: str) -> dict[str, Any]:
    """As `bench.twin.run`; bfloat16 weights for decoding, which is how it is plainly done."""
    on_gpu = torch.cuda.is_available()
    weights = torch.bfloat16 if dtype == "bfloat16" and task == "decode" else torch.float32
    model = transformers.GPT2LMHeadModel.from_pretrained(workload.model, dtype=weights)
    model.eval().to("cuda" if on_gpu else "cpu")
    batches = workload.batches(size)
    if task == "train":
        result = train(model, batches[0], repeats, dtype == "bfloat16")
    else:
        rounds = [decode(model, workload, batches) for _ in range(repeats + 1)]
        result = rounds[-1] | {"seconds": [r["seconds"][0] for r in rounds[1:]]}
    return result | {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_rss(),
    }


def main() -> None:
    task, file, size, repeats, *rest = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    workload = Workload.load(file)
    if rest:
        result = run(task, workload, int(size), int(repeats), *rest)
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(workload.model, dtype=torch.float32)
        model.eval()
        batches = workload.batches(int(size))
        if task == "decode":
            result = decode(model, workload, batches)
        else:
            result = train(model, batches[0], int(repeats))
    result["rss_peak_bytes"] = peak_rss()
    result["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
