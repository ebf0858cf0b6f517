"""`python -m bench [PART ...]`: every figure of one run in one table, equal results required.

Each contender runs in a process of its own, so that peak memory and threads are its own; contenders
take turns for --rounds rounds and the fastest round of each counts. Exits 1 where ids or losses
differ: a faster wrong answer is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import gpu, memory, rollouts
from bench.plot import plot
from bench.workload import (
    GPT2_SMALL,
    Workload,
    checkpoint_prompts,
    random_model,
    random_prompts,
    random_sequences,
)
from coconut.errors import guarded

ROOT = Path(__file__).parent.parent
LOSS_TOLERANCE = 1e-4
"""Largest relative gap of losses; observed 2e-6."""
PARTS = ("generation", "shipped", "training", "rollouts", "sweep", "memory")
"""What runs where none is named; `gpu`, in which a GPU is meant, runs by name and alone."""


class Bench:
    """Runs contenders and collects rows of the table."""

    def __init__(self, directory: Path, rounds: int):
        self.directory, self.rounds = directory, rounds
        self.rows: list[dict[str, Any]] = []
        self.versions: set[str] = set()
        self.is_equal = True

    def contend(
        self, module: str, task: str, workload: Workload, size: int, repeats: int = 1
    ) -> dict[str, Any]:
        """One contender in its own process; its line of JSON."""
        file = workload.save(self.directory / "workload.json")
        command = [sys.executable, "-m", f"bench.{module}", task, str(file), str(size)]
        done = subprocess.run(
            [*command, str(repeats)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
        self.versions.add(result["versions"])
        return result

    def compare(
        self,
        title: str,
        contenders: Sequence[tuple[str, Callable[[], dict[str, Any]], int]],
        is_same: Callable[[dict[str, Any], dict[str, Any]], bool],
    ) -> None:
        """Rows of a table: (name, how to run, units of work in it); the first is ours."""
        best = self.fastest(contenders)
        first = next(iter(best.values()))
        print(f"\n{title}")
        for name, result in best.items():
            same = is_same(first, result)
            self.is_equal &= same
            row = {
                "part": title,
                "contender": name,
                "seconds": result["each"],
                "ratio": result["each"] / first["each"],
                "rss_peak_bytes": result["rss_peak_bytes"],
                "mlx_peak_bytes": result.get("mlx_peak_bytes"),
                "is_equal": same,
            }
            self.rows.append(row)
            mlx = f"{row['mlx_peak_bytes'] / 1e9:6.2f}" if row["mlx_peak_bytes"] else "     -"
            print(
                f"  {name:44} {row['seconds']:9.4f} s {row['ratio']:7.2f}x"
                f" | rss {row['rss_peak_bytes'] / 1e9:6.2f} GB, arrays {mlx} GB"
                f" | {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )

    def fastest(
        self, contenders: Sequence[tuple[str, Callable[[], dict[str, Any]], int]]
    ) -> dict[str, dict[str, Any]]:
        """The fastest round of each, by name, with a unit's seconds, and those of cores, in it."""
        best: dict[str, dict[str, Any]] = {}
        for _ in range(self.rounds):
            for name, run, units in contenders:
                result = run()
                result["each"] = min(result["seconds"]) / units
                # On a machine that does other work, these change least from round to round.
                result["cores"] = min(result.get("core_seconds", [0.0])) / units
                cores = [r["cores"] for r in (result, best.get(name, result))]
                if name not in best or result["each"] < best[name]["each"]:
                    best[name] = result
                best[name]["cores"] = min(cores)
        return best

    def decoding(self, title: str, workload: Workload, sizes: Sequence[int], n_slow: int) -> None:
        """Seconds a question: ours, transformers' generate, and the published way on n_slow."""
        slow = replace(workload, rows=workload.rows[:n_slow])
        n = len(workload.rows)

        def run(module: str, task: str, part: Workload, size: int) -> Callable[[], dict[str, Any]]:
            return lambda: self.contend(module, task, part, size)

        contenders = [(f"ours, batch {s}", run("ours", "decode", workload, s), n) for s in sizes]
        contenders += [
            (f"transformers, batch {s}", run("reference", "decode", workload, s), n)
            for s in (1, *sizes)
        ]
        name = f"the published way, batch 1 ({n_slow} questions)"
        contenders.append((name, run("ours", "published", slow, 1), n_slow))
        self.compare(
            f"{title}: seconds a question",
            contenders,
            lambda a, b: a["ids"][: len(b["ids"])] == b["ids"],
        )

    def training(self, title: str, workload: Workload, repeats: int) -> None:
        """Seconds an update: ours with and without gradient checkpointing, torch's."""

        def run(module: str, task: str) -> Callable[[], dict[str, Any]]:
            return lambda: self.contend(module, task, workload, len(workload.rows), repeats)

        def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
            pairs = zip(a["losses"], b["losses"], strict=True)
            return all(abs(x - y) <= LOSS_TOLERANCE * abs(x) for x, y in pairs)

        contenders = [
            ("ours", run("ours", "train"), 1),
            ("ours, gradient checkpointing", run("ours", "checkpointed"), 1),
            ("transformers and torch", run("reference", "train"), 1),
        ]
        self.compare(f"{title}: seconds an update", contenders, is_same)

    def rollouts(self, title: str, workload: Workload, n_slow: int, repeats: int) -> None:
        """Seconds a rationale in both twins, and how often as fast as the plain loop they are.

        Draws differ, so equal means: transformers finds the same log-probability for what ours
        drew, and nothing else is shorter or longer.
        """
        K, n_new = workload.n_samples, workload.max_new_tokens
        slow = replace(workload, rows=workload.rows[:n_slow])

        def run(name: str, part: Workload, size: int) -> Callable[[], dict[str, Any]]:
            return lambda: self.contend("rollouts", name, part, size, repeats)

        n = len(workload.rows) * K
        plain = f"transformers, {K} rows of a prompt"
        contenders = [(plain, run("transformers", workload, K), n)]
        contenders += [
            (f"{twin}, {size} rows", run(twin, workload, size), n)
            for twin in ("mlx_coconut", "cuda_coconut")
            for size in (K, 4 * K)
        ]
        contenders.append(("transformers, one by one", run("one by one", slow, 1), n_slow * K))
        best = self.fastest(contenders)
        print(f"\n{title}: seconds a rationale, and how often as fast as the first line")
        for name, result in best.items():
            same = all(len(ids) == n_new for ids in result["ids"])
            if result["logprobs"]:
                drawn = zip(np.repeat(np.arange(len(workload.rows)), K), result["ids"], strict=True)
                rows = [[*workload.rows[i], *ids] for i, ids in drawn]
                scored = self.contend(
                    "rollouts", "score", replace(workload, rows=rows, n_targets=n_new), 1
                )
                gap = np.subtract(result["logprobs"], scored["logprobs"])
                same &= bool(abs(gap / scored["logprobs"]).max() <= LOSS_TOLERANCE)
            self.is_equal &= same
            row = {
                "part": title,
                "contender": name,
                "seconds": result["each"],
                "tokens_per_second": n_new / result["each"],
                "core_seconds": result["cores"],
                "times_as_fast": best[plain]["each"] / result["each"],
                "times_as_little_work": best[plain]["cores"] / result["cores"],
                "rss_peak_bytes": result["rss_peak_bytes"],
                "is_equal": same,
            }
            self.rows.append(row)
            print(
                f"  {name:34} {row['seconds']:8.4f} s, {row['times_as_fast']:5.2f}x as fast"
                f" | of all cores {row['core_seconds']:8.4f} s, {row['times_as_little_work']:5.2f}x"
                f" | {row['tokens_per_second']:6.0f} tok/s"
                f" | rss {row['rss_peak_bytes'] / 1e9:5.2f} GB"
                f" | {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )

    def memory(self, title: str, model: Path, rows: Workload) -> None:
        """Peak memory of an update by each method; the first loss of all on one base is equal."""
        file = rows.save(self.directory / "workload.json")
        first: dict[Path, float] = {}

        def run(base: Path, where: Path, method: str, twin: str) -> str:
            command = [sys.executable, "-m", "bench.memory", str(base), str(where), method, twin]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            return done.stdout

        print(f"\n{title}: peak memory of an update")
        for twin, method in ((t, m) for t in memory.TWINS for m in memory.methods(t)):
            base = model
            if method.startswith("qlora"):
                bits = method.split()[1]
                base = model.with_name(f"{model.name}-q{bits}")
                if not base.exists():
                    run(model, base, f"quantize {bits}", twin)
            result = json.loads(run(base, file, method, twin).splitlines()[-1])
            self.versions.add(result["versions"])
            loss = first.setdefault(base, result["losses"][0])
            same = abs(loss - result["losses"][0]) <= LOSS_TOLERANCE * abs(loss)
            self.is_equal &= same
            row = {"part": title, "contender": method, "twin": twin, "is_equal": same}
            self.rows.append(row | result)
            arrays = result["array_peak_bytes"]
            print(
                f"  {twin:12} {method:38} arrays {f'{arrays / 1e9:5.2f}' if arrays else '    -'} GB"
                f" | process {result['rss_peak_bytes'] / 1e9:5.2f} GB"
                f" | trained {result['n_trained']:12,}"
                f" | {result['seconds']:6.2f} s | {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )

    def sweep(self, model: Path) -> list[dict[str, Any]]:
        """Ours against length, batch and latents, one at a time around 360 tokens, 4 rows, 6."""
        points = []
        base = {"length": 360, "batch": 4, "latents": 6}
        for axis, values in (
            ("length", (90, 180, 360, 720)),
            ("batch", (1, 2, 4, 8)),
            ("latents", (0, 3, 6, 12)),
        ):
            for value in values:
                at = base | {axis: value}
                prompts = random_prompts(at["batch"], at["latents"], length=at["length"])
                prompts = replace(prompts, model=str(model), max_new_tokens=16)
                rows = random_sequences(at["batch"], at["length"], at["latents"])
                rows = replace(rows, model=str(model))
                question = self.contend("ours", "decode", prompts, at["batch"])["seconds"]
                update = self.contend("ours", "train", rows, at["batch"])["seconds"]
                points.append(
                    at
                    | {
                        "axis": axis,
                        "seconds_a_question": min(question) / at["batch"],
                        "seconds_an_update": min(update),
                    }
                )
                print(f"  {points[-1]}", flush=True)
        return points


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    about = {"cpu": cpu, "cores": cores, "system": platform.platform(terse=True), "commit": commit}
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        found = subprocess.run(query, stdout=subprocess.PIPE, text=True).stdout
        about["gpu"] = "; ".join(found.strip().splitlines())
    return about


def on_gpu(small: bool, repeats: int) -> int:
    """The part `gpu`. Writes bench/gpu.json, but for `small`, whose figures say nothing."""
    about = machine()
    print(" | ".join(str(value) for value in about.values()))
    with tempfile.TemporaryDirectory() as directory:
        contend = gpu.in_its_own_process(Path(directory))
        shapes = gpu.SMALL if small else gpu.FULL
        rows = gpu.measure(Path(directory), shapes, repeats, contend, gpu.contenders())
    print("\n" + "\n".join(sorted({row["versions"] for row in rows if "versions" in row})))
    if not small:
        results = json.dumps({"machine": about, "rows": rows}, indent=1)
        (ROOT / "bench" / "gpu.json").write_text(results + "\n")
        print("written: bench/gpu.json")
    if not gpu.is_valid(rows):
        print("results differ: the figures above do not count", file=sys.stderr)
    return 0 if gpu.is_valid(rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none; or gpu"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=16, help="for the random GPT-2 small")
    parser.add_argument("--published", type=int, default=2, help="questions for the slow way")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--prompts", type=int, default=8, help="whose rationales are sampled")
    parser.add_argument("--samples", type=int, default=16, help="rationales a prompt")
    parser.add_argument("--repeats", type=int, default=2, help="timed updates a round")
    parser.add_argument("--model", type=Path, help="shipped checkpoint; default data/checkpoints/*")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "prosqa_made_test.json")
    models = ("gpt2", "qwen")
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="for memory")
    parser.add_argument("--small", action="store_true", help="gpu: tiny shapes, to try it anywhere")
    options = parser.parse_args()
    if options.parts == ["gpu"]:
        return on_gpu(options.small, options.repeats)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    parts = options.parts or PARTS

    about = machine()
    print(" | ".join(str(value) for value in about.values()))
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.rounds)
        results: dict[str, Any] = {"machine": about, "rows": bench.rows}
        gpt2 = random_model(Path(directory) / "gpt2")
        if "generation" in parts:
            prompts = random_prompts(options.questions, n_latents=6)
            prompts = replace(prompts, model=str(gpt2), max_new_tokens=options.new_tokens)
            title = f"random GPT-2 small, 6 latents, {options.new_tokens} new tokens"
            bench.decoding(title, prompts, options.batch, options.published)
        if "shipped" in parts:
            checkpoints = sorted((ROOT / "data" / "checkpoints").glob("*/coconut.json"))
            model = options.model or (checkpoints[0].parent if checkpoints else None)
            if model is None:
                parser.error("no checkpoint in data/checkpoints; name one with --model")
            prompts = checkpoint_prompts(model, options.data, n=100)
            prompts = replace(prompts, max_new_tokens=options.new_tokens)
            bench.decoding(f"{model.name}, 100 questions", prompts, [8, 64], n_slow=10)
        if "training" in parts:
            rows = replace(random_sequences(4, 450, n_latents=6), model=str(gpt2))
            title = "GPT-2 small, batch 4 x 450 tokens, 6 latents, float32"
            bench.training(title, rows, options.repeats)
        if "rollouts" in parts:
            small = rollouts.SMALL | {"vocab_size": rollouts.VOCABULARY}
            model = random_model(Path(directory) / "small", GPT2_SMALL | small)
            drawn = rollouts.prompts(options.prompts, options.samples, options.new_tokens)
            n_layer, n_embd = rollouts.SMALL["n_layer"], rollouts.SMALL["n_embd"]
            title = (
                f"{n_layer} layers x {n_embd}, {options.prompts} prompts x {options.samples}"
                f" rationales x {options.new_tokens} tokens"
            )
            bench.rollouts(title, replace(drawn, model=str(model)), 1, options.repeats)
        if "sweep" in parts:
            print("\nours, random GPT-2 small, 16 new tokens")
            results["sweep"] = bench.sweep(gpt2)
            plot(results["sweep"], about, ROOT / "docs" / "bench.png")
        if "memory" in parts and "gpt2" in options.models:
            rows = random_sequences(2, 256, n_latents=6)
            bench.memory("GPT-2 small, batch 2 x 256 tokens, 6 latents, float32", gpt2, rows)
        if "memory" in parts and "qwen" in options.models:
            config = json.loads((ROOT / "args/models/qwen2_5_0_5b.json").read_text())
            qwen = random_model(Path(directory) / "qwen", config)
            rows = random_sequences(1, 128, n_latents=6)
            bench.memory("Qwen2.5-0.5B, batch 1 x 128 tokens, 6 latents, float32", qwen, rows)
    about["versions"] = sorted(bench.versions)
    own = tuple(parts) in (("memory",), ("rollouts",))  # beside the last run of the others
    file = f"{parts[0]}.json" if own else "results.json"
    (ROOT / "bench" / file).write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: bench/{file}" + (", docs/bench.png" if "sweep" in parts else ""))
    if not bench.is_equal:
        print("results differ: the figures above do not count", file=sys.stderr)
    return 0 if bench.is_equal else 1


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
