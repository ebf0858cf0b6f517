"""The checks of `mac-check`: (bench) -> what was seen, with `ok`: whether it is as it should be.

On a CPU they take small shapes, which shows that the checks work, not how fast anything is.
"""

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import yaml

from coconut.backend import Backend, MakeBackend
from coconut.batches.batch import Batch, collate
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding
from coconut.checkpoints.source import open_source
from coconut.commands.run import start_run
from coconut.config.keys import RunConfig
from coconut.config.reading import load_config
from coconut.files import here_or_shipped, read_json, shipped, write_json
from coconut.inside.inspect import add_options
from coconut.inside.page.serve import open_server
from coconut.plan.memory import shape_of, training_bytes
from coconut.world import World

GPT2_SMALL = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
N_LATENTS = 6
N_UPDATES = 60
GOLDEN_GAP = 2e-4
"""Of logits (absolute), of the loss and of a gradient's norm (relative), against published code."""


@dataclass(frozen=True)
class Bench:
    """What a check is given. folder: a temporary one. rows, tokens: of an update."""

    twin: str
    make_backend: MakeBackend
    probes: ModuleType
    folder: Path
    on_gpu: bool

    @property
    def shape(self) -> dict[str, int]:
        """What is timed."""
        if self.on_gpu:
            return {"rows": 4, "tokens": 448, "question": 384, "new_tokens": 32}
        return {"rows": 2, "tokens": 128, "question": 128, "new_tokens": 16}

    def backend(self, **keys: Any) -> tuple[Backend, RunConfig]:
        """A random model of the size that is timed, ready to train, and its configuration."""
        model = json.loads(Path(here_or_shipped("args/models/prosqa_gpt2.json")).read_text())
        model |= GPT2_SMALL if self.on_gpu else {}
        path = self.folder / "model.json"
        write_json(path, model)
        config = self.tiny("timed", model_config_path=str(path), **keys)
        source = open_source(config).source
        return self.make_backend(config, source), config

    def tiny(self, name: str, **keys: Any) -> RunConfig:
        """args/tiny_coconut.yaml, cut to N_UPDATES updates, with other keys."""
        given = shipped_run("args/tiny_coconut.yaml")
        if not self.on_gpu:
            given["batch_size_training"] = 32
        given["generate"] |= {"items": given["batch_size_training"] * N_UPDATES}
        given |= {"save_path": str(self.folder), "name": name, "num_epochs": 1, "report": False}
        return load_config(given | keys)

    def train(self, name: str, **keys: Any) -> list[float]:
        """The loss of each update of a tiny run."""
        config = self.tiny(name, **keys)
        start_run(config, self.make_backend, self.twin, World())
        return losses(config.run_dir)

    def batch(self, rows: int, tokens: int, labels: bool) -> Batch:
        """Random rows with N_LATENTS thoughts."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 2000, (rows, tokens)).tolist()
        first = tokens // 2 if labels else tokens - N_LATENTS - 1
        return collate(
            [Row(i, r, r if labels else None, first, N_LATENTS) for i, r in enumerate(ids)], 0
        )


def shipped_run(name: str) -> dict[str, Any]:
    """The keys of a run that ships, its files found from any folder."""
    given = yaml.safe_load(Path(here_or_shipped(name)).read_text())
    return {
        key: here_or_shipped(value) if key.endswith("_path") else value
        for key, value in given.items()
    }


def losses(run: Path) -> list[float]:
    """The losses of a run's log."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line.get("event") == "train"]


def float32_products(bench: Bench) -> dict[str, Any]:
    """a float32 product is one, not TF32"""
    error = bench.probes.product_error()
    return {"ok": error < 1e-4, "error": error}


def layer_norm(bench: Bench) -> dict[str, Any]:
    """the gradient of LayerNorm's bias, 2,000 times"""
    wrong = bench.probes.wrong_bias_gradients()
    return {"ok": wrong == 0, "wrong": wrong}


def golden(bench: Bench) -> dict[str, Any]:
    """logits, loss and gradients of the published code; the largest gaps"""
    folder = shipped("tests/golden")
    if not folder.exists():
        return {"ok": True, "skipped": "the golden vectors lie in a clone of the repository only"}
    from safetensors.numpy import load_file

    (case,) = (c for c in json.loads((folder / "forward.json").read_text()) if c["name"] == "mixed")
    arrays, gaps = load_file(folder / "forward.safetensors"), {}
    real = np.array(case["inputs"]["attention_mask"], bool)
    latent = json.loads((folder / "cases.json").read_text())["tokens"]["latent"]
    rows = []
    for i, row in enumerate(real):
        ids, labels = (
            np.array(case["inputs"][n][i])[row].tolist() for n in ("input_ids", "labels")
        )
        first = ids.index(latent) if latent in ids else -1
        rows.append(Row(i, ids, labels, first, ids.count(latent)))
    for model in ("gpt2-tiny", "qwen2-tiny"):
        expected = case["outputs"][model]
        logits, loss, gradients = bench.probes.run_model(
            folder / "models" / model, collate(rows, 25)
        )
        if (wanted := arrays.get(f"{model}/mixed/logits")) is not None:
            gaps[f"{model} logits"] = float(np.abs(logits - wanted)[real].max())
        gaps[f"{model} loss"] = abs(loss / expected["loss_float64"] - 1)
        norms = {n: float(np.linalg.norm(g)) for n, g in gradients.items()}
        norms |= {f"transformer.{n}": norm for n, norm in norms.items()}
        largest = max(expected["grad_norms"].values())
        gaps[f"{model} gradients"] = max(
            abs(norms[n] - norm) / largest for n, norm in expected["grad_norms"].items()
        )
    return {"ok": max(gaps.values()) < GOLDEN_GAP, "gaps": gaps}


def demo(bench: Bench) -> dict[str, Any]:
    """the shipped model on ProsQA's test questions, both names asked"""
    given = shipped_run("args/prosqa_coconut_eval.yaml")
    if not bench.on_gpu:
        items = json.loads(Path(given["val_path"]).read_text())[:100]
        given["val_path"] = str(bench.folder / "questions.json")
        Path(given["val_path"]).write_text(json.dumps(items))
    config = load_config(given | {"save_path": str(bench.folder), "name": "demo"})
    start_run(config, bench.make_backend, bench.twin, World())
    summary = read_json(config.run_dir / "summary.json")
    seen = {n: summary[n] for n in ("accuracy", "both_accuracy", "samples_per_second")}
    return {"ok": summary["both_accuracy"] > 0.98} | seen


def repeatable(bench: Bench) -> dict[str, Any]:
    """two equal trainings; how far their losses part (scatter-adds on a GPU have no order)"""
    first, second = bench.train("first"), bench.train("second")
    gap = float(np.abs(np.array(first) - second).max())
    is_right = len(first) == N_UPDATES and first[-1] < first[0] - 0.5
    return {"ok": is_right and gap < 0.2, "largest_gap": gap, "losses": [first[0], first[-1]]}


def memory(bench: Bench) -> dict[str, Any]:
    """bytes over 50 updates: do they grow, and is the estimate of --check right"""
    backend, config = bench.backend()
    rows, tokens = bench.shape["rows"], bench.shape["tokens"]
    batch = bench.batch(rows, tokens, labels=True)
    for update in range(50):
        backend.train_step([batch], 1e-5, (0, update))
        if update == 1:
            backend.memory()
        if update == 2:
            early = backend.memory()
    late = backend.memory()
    shape = shape_of(backend.config, backend.config["vocab_size"], "model")
    estimate = training_bytes(
        shape, rows, tokens, batch.n_targets, config, n_behind=tokens - batch.first_latent
    )
    growth = late["active_memory_bytes"] / early["active_memory_bytes"] - 1
    ratio = early["peak_memory_bytes"] / estimate
    most = 1.2 if bench.on_gpu else 2.0  # of small shapes, what the estimate leaves out is as much
    return {
        "ok": growth < 0.02 and 0.4 < ratio < most, "growth": growth, "peak_over_estimate": ratio
    } | late  # fmt: skip


def decoding(bench: Bench) -> dict[str, Any]:
    """new tokens a second at batch 1 and 8, with thoughts"""
    backend, _ = bench.backend()
    seen: dict[str, Any] = {"ok": True}
    for rows in (1, 8):
        batch = bench.batch(rows, bench.shape["question"], labels=False)
        decoding = Decoding(bench.shape["new_tokens"], eos_id=-1)
        backend.generate(batch, decoding)
        start = time.perf_counter()
        found = backend.generate(batch, decoding)
        seconds = time.perf_counter() - start
        seen[f"tokens_per_second_batch_{rows}"] = sum(map(len, found)) / seconds
    return seen


def update(bench: Bench) -> dict[str, Any]:
    """seconds of a training update in float32 and in bfloat16, and of the first, which compiles"""
    seen: dict[str, Any] = {"ok": True}
    for name, bf16 in (("float32", False), ("bfloat16", True)):
        backend, _ = bench.backend(bf16=bf16)
        batch, times = bench.batch(bench.shape["rows"], bench.shape["tokens"], labels=True), []
        for number in range(6):
            start = time.perf_counter()
            stats = backend.train_step([batch], 1e-5, (0, number))
            times.append(time.perf_counter() - start)
        seen[f"{name}_first_seconds"] = times[0]
        seen[f"{name}_seconds"] = sorted(times[1:])[2]
        seen["ok"] &= bool(np.isfinite(stats.loss_sum))
    return seen


def page(bench: Bench) -> dict[str, Any]:
    """`serve` answers a question"""
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(["--model", "prosqa"])
    items = json.loads(Path(here_or_shipped("data/prosqa_tiny.json")).read_text())
    body = json.dumps({"question": items[0]["question"]}).encode()
    with open_server(bench.twin, bench.make_backend, options) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/ask"
        start = time.perf_counter()
        with urlopen(Request(url, body, {"Content-Type": "application/json"})) as reply:
            found = json.load(reply)
        seconds = time.perf_counter() - start
        server.shutdown()
    return {"ok": bool(found["stops"]), "seconds": seconds}


def processes(bench: Bench) -> dict[str, Any]:
    """two launched processes train what one does"""
    keys: dict[str, Any] = {"batch_size_training": 16}
    one = bench.tiny("one", gradient_accumulation_steps=2, **keys)
    two = bench.tiny("two", **keys)
    start_run(one, bench.make_backend, bench.twin, World())
    path = bench.folder / "two.yaml"
    path.write_text(two.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--starting-port", port]
    command = [*launcher, "--", sys.executable, "-m", "mlx_coconut", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if not (two.run_dir / "log.jsonl").exists():
        raise RuntimeError(f"mlx.launch: {(done.stderr or done.stdout)[-300:]}")
    gaps = np.abs(np.array(losses(one.run_dir)) - losses(two.run_dir))
    # Later ones part as two equal runs may.
    return {
        "ok": bool(gaps[:10].max() < 1e-3),
        "gap_10": float(gaps[:10].max()),
        "gap": float(gaps.max()),
    }


CHECKS = (
    float32_products, layer_norm, golden, demo, repeatable, memory, decoding, update, page,
    processes,
)  # fmt: skip
