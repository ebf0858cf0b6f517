"""The part `gpu`: GPT-2 small at ProsQA's lengths on one GPU, beside the same written plainly.

Training at batch 32, generation at batches 1 and 256, six latents, float32 and bfloat16. Ours are
the torch twin and, where MLX sees a GPU of NVIDIA's, the MLX twin.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.workload import GPT2_SMALL, Workload, random_model, random_prompts, random_sequences

N_LATENTS = 6
PLAIN = "transformers"
LOSSES = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest relative gap of losses; between bfloat16 runs that of its rounding."""
SAME_ROWS = 0.95
"""Rows that must have the same tokens in float32: GPUs add up in different orders, and a random
model's best two tokens may be as near. In bfloat16 the share is only shown."""


@dataclass(frozen=True)
class Shapes:
    """config: of the model. rows: of a training batch; length: of rows, ProsQA's if None."""

    config: dict[str, Any]
    rows: int
    length: int | None
    targets: int
    decoded: tuple[tuple[int, int], ...]
    """(batch size, questions) of each measurement of generation."""
    new_tokens: int


FULL = Shapes(GPT2_SMALL, 32, None, 50, ((1, 16), (256, 256)), 64)
SMALL = Shapes(
    GPT2_SMALL | {"n_embd": 16, "n_layer": 2, "n_head": 2}, 4, 24, 6, ((1, 2), (3, 5)), 3
)
"""The same path in seconds, to try it without a GPU."""

Contend = Callable[[str, str, Workload, int, int, str], dict[str, Any]]
"""(contender, task, workload, batch size, repeats, dtype) -> what `bench.twin.run` gives."""


def contenders() -> list[str]:
    """Ours, and transformers last."""
    ours = ["cuda_coconut"]
    if importlib.util.find_spec("mlx") is not None:
        import mlx.core as mx

        if hasattr(mx, "cuda") and mx.cuda.is_available():
            ours.append("mlx_coconut")
    return [*ours, PLAIN]


def in_its_own_process(directory: Path) -> Contend:
    """A process each: peak memory is its own, and a GPU's memory is given back."""

    def contend(
        name: str, task: str, workload: Workload, size: int, repeats: int, dtype: str
    ) -> dict[str, Any]:
        module = ["bench.reference"] if name == PLAIN else ["bench.twin", name]
        file = str(workload.save(directory / "workload.json"))
        command = [sys.executable, "-m", *module, task, file, str(size), str(repeats), dtype]
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"error": lines[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    return contend


def measure(
    directory: Path, shapes: Shapes, repeats: int, contend: Contend, names: list[str]
) -> list[dict[str, Any]]:
    """A row a contender, task and dtype; prints each. The fastest repeat counts."""
    model = str(random_model(directory / "gpu", shapes.config, twin="cuda_coconut"))
    length = shapes.length
    train = random_sequences(shapes.rows, length, N_LATENTS, shapes.targets)
    works = [("train", shapes.rows, train)]
    for size, n in shapes.decoded:
        prompts = random_prompts(n, N_LATENTS, length=length)
        works.append(("decode", size, replace(prompts, max_new_tokens=shapes.new_tokens)))
    rows = []
    for dtype in LOSSES:
        for task, size, workload in works:
            done = f"{shapes.new_tokens} new tokens" if task == "decode" else "an update"
            print(f"\n{task}, batch {size}, {N_LATENTS} latents, {done}, {dtype}")
            first: dict[str, Any] | None = None
            for name in names:
                result = contend(name, task, replace(workload, model=model), size, repeats, dtype)
                row = {"contender": name, "task": task, "batch": size, "dtype": dtype} | result
                if "error" not in result:
                    first = first or result
                    row |= _compared(first, result, task, dtype)
                    n_samples = size if task == "train" else len(workload.rows)
                    row["samples_per_second"] = n_samples / min(result["seconds"])
                rows.append({k: v for k, v in row.items() if k != "ids"})
                print(f"  {name:14} {_in_words(row)}", flush=True)
    return rows


def is_valid(rows: list[dict[str, Any]]) -> bool:
    """Whether ours ran everywhere and everyone who ran has the same results."""
    ours = [row for row in rows if row["contender"] != PLAIN]
    return all("error" not in row for row in ours) and all(
        row.get("is_equal", True) for row in rows
    )


def _compared(first: dict[str, Any], result: dict[str, Any], task: str, dtype: str) -> dict:
    if task == "train":
        pairs = zip(first["losses"], result["losses"], strict=True)
        gap = max(abs(a - b) / abs(a) for a, b in pairs)
        return {"loss_gap": gap, "is_equal": gap <= LOSSES[dtype]}
    same = [a == b for a, b in zip(first["ids"], result["ids"], strict=True)]
    share = sum(same) / len(same)
    return {"same_rows": share, "is_equal": dtype != "float32" or share >= SAME_ROWS}


def _in_words(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"did not run: {row['error']}"
    agrees = f"same rows {row['same_rows']:.0%}" if "same_rows" in row else None
    return (
        f"{row['samples_per_second']:9.2f} samples/s | {min(row['seconds']):8.4f} s"
        f" | peak {row['device_peak_bytes'] / 1e9:6.2f} GB on {row['device']}"
        f" | {agrees or format(row['loss_gap'], '.0e') + ' between losses'}"
        f" | {'equal' if row['is_equal'] else 'DIFFERENT'}"
    )
