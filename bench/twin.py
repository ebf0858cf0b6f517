"""One of the twins as a contender, on the machine's GPU where it has one.

`python -m bench.twin TWIN TASK WORKLOAD.json BATCH_SIZE REPEATS DTYPE`; prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.workload import Workload, peak_rss
from coconut.batches.decoding import Decoding
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig


def run(
    twin: str, task: str, workload: Workload, size: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """Seconds of each repeat of a task, `train` or `decode`, and what came out.

    train: a repeat is an update on the first batch. decode: all rows. One more goes before, which
    is not counted: it compiles, and fills the pools of memory.
    """
    directory = Path(workload.model)
    config = json.loads((directory / "config.json").read_text())
    source = Source(config, directory, config["vocab_size"], range(0), None)
    keys = RunConfig(method="coconut", bf16=dtype == "bfloat16")
    backend = importlib.import_module(f"{twin}.run").make_backend(keys, source)
    batches = workload.batches(size)
    if task == "train":
        result = _train(backend, batches[0], repeats)
    else:
        generate = importlib.import_module(f"{twin}.thoughts.generate").generate
        decoding = Decoding(workload.max_new_tokens, workload.eos_id)
        result = {"seconds": [], "ids": [[]] * len(workload.rows)}
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for batch in batches:
                with backend.trainer.compute_weights():
                    rows = generate(backend.model, batch, batch.n_passes, decoding)
                for i, new in zip(batch.idx, rows, strict=True):
                    result["ids"][i] = new
            result["seconds"].append(time.perf_counter() - start)
        del result["seconds"][0]
    return result | {
        "device": backend.device,
        "device_peak_bytes": backend.memory()["peak_memory_bytes"],
        "rss_peak_bytes": peak_rss(),
        "versions": backend.note,
    }


def _train(backend, batch, repeats: int) -> dict[str, Any]:
    losses, seconds = [], []
    for number in range(repeats + 1):
        start = time.perf_counter()
        losses.append(backend.train_step([batch], 1e-4, (0, number)).loss)
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds[1:]}


def main() -> None:
    twin, task, file, size, repeats, dtype = sys.argv[1:]
    result = run(twin, task, Workload.load(file), int(size), int(repeats), dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
