"""Which rules, precisions and schedules hold when a small Qwen2 learns to think, at one budget.

    python -m bench.recipe [--seeds 0 1] [--rows NAME ...] [--table]

A 4-layer Qwen2 learns from random weights to walk down ProsQA graphs, a concept a step. From that
checkpoint every row trains Coconut's stages with the same data, updates and learning rate but for
what its name says, in the torch twin. Results are kept in bench/recipe.json after each row, and a
row that is there is not trained again; the table of all is printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import machine
from coconut.config.keys import RunConfig
from coconut.config.reading import check_config
from coconut.errors import guarded
from coconut.files import write_text
from coconut.run.curriculum_loop import Runner
from coconut.tasks import prosqa, prosqa_graph
from coconut.tasks.generated import write
from cuda_coconut.backend import Backend

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "recipe.json"
N_LAYERS, N_QUESTIONS = 4, 500
GRAPHS = {"nodes": 6, "min_hops": 1, "max_hops": 3, "swapped": 0.5}
COMMON: dict[str, Any] = {
    "tokenizer": "prosqa",
    "batch_size_training": 64,
    "adam_beta2": 0.99,
    "warmup_updates": 30,
    "lr_schedule": "linear",
    "max_grad_norm": 1.0,
    "reset_optimizer": "never",
    "max_new_tokens": 16,
    "pad_multiple": 4,
    "eval_every": 100,
    "max_latent_stage": 3,
    "report": False,
}
BASE: dict[str, Any] = COMMON | {
    "method": "coconut_no_curriculum",
    "generate": GRAPHS | {"steps": "walk", "items": 6400, "seed": 1},
    "num_epochs": 8,
    "lr": 0.004,
}
STAGES: dict[str, Any] = COMMON | {
    "method": "coconut",
    "generate": GRAPHS | {"items": 4352},
    "epochs_per_stage": 1,
    "num_epochs": 6,
    "lr": 0.003,
    "keep_checkpoints": 1,
}
"""A stage an epoch: all steps told, one thought, two, three, and twice only thoughts."""
FINER = {"generate": GRAPHS | {"items": 2176}, "num_epochs": 12, "c_thought": 2}
ROUNDED = {"bf16": True, "rounds": True}
ROWS: dict[str, dict[str, Any]] = {
    "last": {},
    "last, rms": {"feedback": "last|rms"},
    "layer:-1": {"feedback": "layer:-1"},
    "layer:-1, rms": {"feedback": "layer:-1|rms"},
    "depth:0.5": {"feedback": "depth:0.5"},
    "depth:0.5, rms": {"feedback": "depth:0.5|rms"},
    "last + suppressed, rms": {"feedback": "suppressed|rms"},
    "soft": {"feedback": "soft"},
    "last, mlp": {"feedback": "last|mlp"},
    "last, gate": {"feedback": "last|gate"},
    "token": {"feedback": "token"},
    "zero": {"feedback": "zero"},
    "shuffle": {"feedback": "shuffle"},
    "bf16 compute": {"bf16": True},
    "bf16 compute and weights": ROUNDED,
    "lr 0.01": {"lr": 0.01},
    "lr 0.0003": {"lr": 0.0003},
    "lr 0.0003, bf16 compute": {"lr": 0.0003, "bf16": True},
    "lr 0.0003, bf16 compute and weights": ROUNDED | {"lr": 0.0003},
    "stage_mixing: item": {"stage_mixing": "item"},
    "c_thought 2": FINER | {"epochs_per_stage": 2},
    "c_thought 2, growth by one": FINER | {"latent_growth": "one"},
}
"""Name -> what differs from STAGES. rounds: weights are kept in bfloat16."""


class RoundedWeights(Backend):
    """A back end whose weights lose after every update what bfloat16 does not hold."""

    def train_step(self, *given: Any, **named: Any) -> Any:
        stats = super().train_step(*given, **named)
        with torch.no_grad():
            for w in self.model.parameters():
                w.copy_(w.bfloat16())
        return stats


def configure(directory: Path, name: str, seed: int, keys: dict[str, Any]) -> RunConfig:
    """A run of the comparison; its data, too, follow the seed, unless keys name another."""
    generate = {"fresh": True, "seed": 100 + seed} | keys["generate"]
    where = {"save_path": str(directory), "name": name, "val_path": str(directory / "val.json")}
    return check_config(keys | where | {"seed": seed, "generate": generate})


def train(config: RunConfig, make: Callable[..., Backend]) -> dict[str, Any]:
    """Train a run, whose lines go to a file; the summary of its last evaluation."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with (config.run_dir / "output.txt").open("a") as out, contextlib.redirect_stdout(out):
        Runner(config, make, "cuda_coconut").train()
    return json.loads((config.run_dir / "summary.json").read_text())


def train_base(directory: Path) -> Path:
    """The checkpoint that all rows start from; made once."""
    if not (directory / "val.json").exists():
        asked = prosqa_graph.Options(**GRAPHS | {"swapped": 0.0})
        write(directory / "val.json", prosqa.generate, prosqa.keys, asked, 9, N_QUESTIONS, [])
    tiny = json.loads((ROOT / "args/models/tiny_qwen2.json").read_text())
    model = directory / "model.json"
    write_text(model, json.dumps(tiny | {"num_hidden_layers": N_LAYERS}))
    config = configure(directory, "base", 0, BASE | {"model_config_path": str(model)})
    train(config, Backend)
    return config.run_dir / f"epoch_{config.num_epochs:02d}"


def measure(directory: Path, base: Path, name: str, seed: int) -> dict[str, Any]:
    """Train a row with a seed."""
    keys = STAGES | ROWS[name] | {"load_model_path": str(base)}
    make = RoundedWeights if keys.pop("rounds", False) else Backend
    if "feedback" in keys:
        keys["replace_feedback"] = True
    folder = "".join(c if c.isalnum() else "-" for c in name)
    config = configure(directory, f"{folder}-{seed}", seed, keys)
    start = time.process_time()
    found = train(config, make)
    return {
        "name": name,
        "seed": seed,
        "accuracy": found["accuracy"],
        "swapped_accuracy": found["swapped_accuracy"],
        "both_accuracy": found["both_accuracy"],
        "scale": found.get("thoughts", {}).get("scale"),
        "cpu_seconds": time.process_time() - start,
        "commit": commit(),
    }


def commit() -> str:
    """What the code is."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a row, the mean over its seeds and each of them."""
    lines = [
        "| row | both, mean | a seed each: as asked / swapped / both | thought/embedding, rms |",
        "| --- | --- | --- | --- |",
    ]
    for name in ROWS:
        seeds = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        if not seeds:
            continue
        mean = sum(row["both_accuracy"] for row in seeds) / len(seeds)
        each = "; ".join(
            " / ".join(
                f"{100 * row[k]:.1f}" for k in ("accuracy", "swapped_accuracy", "both_accuracy")
            )
            for row in seeds
        )
        scales = ["–" if r["scale"] is None else f"{r['scale'][-1]:.2f}" for r in seeds]
        lines.append(f"| {name} | {100 * mean:.1f} | {each} | {'; '.join(scales)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recipe", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="NAME")
    parser.add_argument("--directory", type=Path, default=Path("runs/recipe"), help="for the runs")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row: {', '.join(sorted(unknown))}; known: {', '.join(ROWS)}")
    results: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "rows": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    done = {(row["name"], row["seed"]) for row in results["rows"]}
    wanted = [(name, seed) for name in options.rows for seed in options.seeds]
    for name, seed in [] if options.table else wanted:
        if (name, seed) in done:
            continue
        row = measure(options.directory, train_base(options.directory), name, seed)
        results["rows"].append(row)
        write_text(RESULTS, json.dumps(results, indent=1) + "\n")
        print(
            f"{name}, seed {seed}: both {100 * row['both_accuracy']:.1f} %,"
            f" {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )
    print(f"\n{results['machine']['cpu']}, torch {results['torch']}, one thread")
    print(table(results["rows"]))


if __name__ == "__main__":
    guarded(lambda: main())
