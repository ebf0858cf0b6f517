"""What is measured: a model directory and rows of tokens, as JSON that every contender reads."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coconut.batches.batch import Batch, collate
from coconut.batches.curriculum import IGNORED, Row
from coconut.batches.dataset import read_items, tokenize
from coconut.checkpoints.checkpoint import describe
from coconut.checkpoints.initial import initial_weights
from coconut.errors import UserError
from coconut.text.opening import load_tokenizer

GPT2_SMALL = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50260,
    "n_positions": 1024,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    # No dropout, so that both sides compute the same numbers.
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.02,
}
EOS, START, END, LATENT = 50256, 50257, 50258, 50259

QUESTION_TOKENS = (362, 56, 210, 525)
"""Mean, spread, least and most tokens of a question of ProsQA's validation set in GPT-2's
encoding."""


@dataclass(frozen=True)
class Workload:
    """rows: prompts for decoding or, with n_targets, sequences whose last tokens are labelled."""

    model: str
    rows: list[list[int]]
    latent_id: int
    eos_id: int
    max_new_tokens: int = 0
    n_targets: int = 0
    n_samples: int = 1
    """Sequences to sample of each prompt."""

    def save(self, path: Path) -> Path:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> Workload:
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def batches(self, size: int) -> list[Batch]:
        """Rows in batches, like lengths together, each exactly as long as its longest row needs."""
        rows = []
        for i, ids in enumerate(self.rows):
            n_latents = ids.count(self.latent_id)
            first = ids.index(self.latent_id) if n_latents else -1
            labels = None
            if self.n_targets:
                labels = [IGNORED] * (len(ids) - self.n_targets) + ids[-self.n_targets :]
            rows.append(Row(i, ids, labels, first, n_latents))
        rows.sort(key=lambda row: len(row.ids))
        return [collate(rows[i : i + size], self.eos_id) for i in range(0, len(rows), size)]


def random_model(
    directory: Path, config: dict[str, Any] = GPT2_SMALL, twin: str = "mlx_coconut"
) -> Path:
    """A model with random weights, GPT-2 small, as a checkpoint that both sides read."""
    models, weights = (importlib.import_module(f"{twin}.{n}") for n in ("models", "models.weights"))
    model, module = models.build(config, "bench")
    shapes = {name: w.shape for name, w in weights.hf_weights(model, module).items()}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    drawn = initial_weights(shapes, config, seed=0)
    save_file(drawn, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def random_prompts(n: int, n_latents: int, seed: int = 0, length: int | None = None) -> Workload:
    """Prompts with the lengths of ProsQA's questions, or all of one, for the random GPT-2 small."""
    rng = np.random.default_rng(seed)
    mean, spread, least, most = QUESTION_TOKENS
    thoughts = [START, *[LATENT] * n_latents, END]
    rows = []
    for _ in range(n):
        n_question = int(np.clip(rng.normal(mean, spread), least, most))
        if length is not None:
            n_question = length - len(thoughts)
        rows.append([*rng.integers(EOS, size=n_question).tolist(), *thoughts])
    return Workload("", rows, LATENT, EOS)


def random_sequences(n: int, length: int | None, n_latents: int, n_targets: int = 50) -> Workload:
    """Training rows of one length or of ProsQA's, their last n_targets tokens labelled."""
    prompts = random_prompts(n, n_latents, length=length and length - n_targets)
    rng = np.random.default_rng(1)
    rows = [[*row, *rng.integers(EOS, size=n_targets).tolist()] for row in prompts.rows]
    return replace(prompts, rows=rows, n_targets=n_targets)


def checkpoint_prompts(directory: Path, data: Path, n: int) -> Workload:
    """The first n questions of a data file with the latents that a checkpoint was trained to."""
    made_with = describe(directory)["coconut"]
    if made_with is None:
        raise UserError(str(directory), "no coconut.json: not a checkpoint with latents")
    tokenizer = load_tokenizer(directory).with_latents()
    n_latents = min(made_with["stage"], made_with["max_latent_stage"]) * made_with["c_thought"]
    thoughts = [tokenizer.start_id, *[tokenizer.latent_id] * n_latents, tokenizer.end_id]
    samples = tokenize(read_items(str(data))[:n], tokenizer, str(data))
    rows = [[*sample.question, *thoughts] for sample in samples]
    return Workload(str(directory), rows, tokenizer.latent_id, tokenizer.eos_id)


def reset_peak_rss() -> None:
    """Let `peak_rss` begin anew, where the system can (Linux)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "linux":
        # Not getrusage: a child starts with its parent's peak there.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
