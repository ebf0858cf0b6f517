"""Peak memory of two training updates by each method and twin, a process each.

`python -m bench.memory MODEL WORKLOAD.json METHOD TWIN`; prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.workload import END, LATENT, START, Workload, peak_rss, reset_peak_rss
from coconut.checkpoints.adapter_files import fingerprint
from coconut.checkpoints.adapters import Adapter
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora

TWINS = ("mlx_coconut", "cuda_coconut")
RANK = 8
METHODS: dict[str, tuple[Lora | None, dict[str, Any]]] = {
    "full": (None, {}),
    "full, gradient checkpointing": (None, {"gradient_checkpointing": True}),
    "lora": (Lora(rank=RANK), {}),
    "lora, gradient checkpointing": (Lora(rank=RANK), {"gradient_checkpointing": True}),
    "dora": (Lora("dora", rank=RANK), {}),
    "qlora, 8 bits": (Lora(rank=RANK), {}),
    "qlora, 4 bits": (Lora(rank=RANK), {}),
    "qlora, 4 bits, gradient checkpointing": (Lora(rank=RANK), {"gradient_checkpointing": True}),
}
"""Name -> what is trained and how. A qlora's base comes quantised, by `quantize`."""


def methods(twin: str) -> list[str]:
    """What a twin can: torch reads no weights that MLX quantised."""
    return [m for m in METHODS if twin == "mlx_coconut" or not m.startswith("qlora")]


def quantize(source: Path, target: Path, bits: int) -> Path:
    """The base as mlx_lm quantises it, groups of 64: without tokenizer, for this measurement."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source)
    model, config = quantize_model(model, config, 64, bits)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


def measure(directory: Path, workload: Workload, method: str, twin: str) -> dict[str, Any]:
    """Bytes and seconds of the second update: the first one traces, and has no moments yet."""
    lora, keys = METHODS[method]
    config = json.loads((directory / "config.json").read_text())
    adapter = None
    if lora is not None:
        rows = (START, END, LATENT)
        adapter = Adapter(lora, rows, str(directory), fingerprint(directory), range(0), None)
    source = Source(config, directory, config["vocab_size"], range(0), None, adapter=adapter)
    make_backend = importlib.import_module(f"{twin}.run").make_backend
    backend = make_backend(RunConfig(method="coconut", **keys), source)
    (batch,) = workload.batches(len(workload.rows))
    backend.memory()  # from here on: reading a file needs more than holding the weights
    reset_peak_rss()
    losses = [backend.train_step([batch], 1e-4, (0, 0)).loss]
    start = time.perf_counter()
    losses.append(backend.train_step([batch], 1e-4, (0, 1)).loss)
    return {
        "losses": losses,
        "seconds": time.perf_counter() - start,
        # torch counts no allocations on a CPU.
        "array_peak_bytes": backend.memory()["peak_memory_bytes"]
        if twin == "mlx_coconut"
        else None,
        "rss_peak_bytes": peak_rss(),
        "n_params": backend.n_params,
        "n_trained": backend.n_trained,
        "versions": backend.note,
    }


def main() -> None:
    directory, file, method, twin = sys.argv[1:]
    if method.startswith("quantize "):
        quantize(Path(directory), Path(file), int(method.split()[1]))
        return
    print(json.dumps(measure(Path(directory), Workload.load(file), method, twin)))


if __name__ == "__main__":
    main()
