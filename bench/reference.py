"""The same work written plainly with transformers and torch on the CPU.

`python -m bench.reference TASK WORKLOAD.json BATCH_SIZE REPEATS`; prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from bench.workload import Workload, peak_rss
from coconut.batch import Batch
from coconut.curriculum import IGNORED


def latent_passes(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Logits at every position, inputs with thoughts in place, and the keys and values.

    One forward call for each latent, over the columns that are new, with past_key_values.
    """
    ids, mask = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.mask).long()
    positions = torch.from_numpy(batch.positions).long()
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
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        cache, thought = out.past_key_values, out.hidden_states[-1][:, -1]
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
        prompt = torch.cat([torch.from_numpy(batch.ids).long(), first], dim=1)
        mask = torch.cat([torch.from_numpy(batch.mask).long(), torch.ones_like(first)], dim=1)
        out = model.generate(
            prompt,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=workload.max_new_tokens - 1,
            do_sample=False,
            eos_token_id=workload.eos_id,
            pad_token_id=workload.eos_id,
        )
        for i, row in zip(batch.idx, out[:, batch.ids.shape[1] :].tolist(), strict=True):
            end = row.index(workload.eos_id) + 1 if workload.eos_id in row else len(row)
            ids[i] = row[:end]
    return {"seconds": [time.perf_counter() - start], "ids": ids}


def train(model, batch: Batch, repeats: int) -> dict[str, Any]:
    """Losses of the first updates, and seconds of each."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    labels = torch.from_numpy(batch.labels).long()
    losses, seconds = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
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


def main() -> None:
    task, file, size, repeats = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    workload = Workload.load(file)
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
