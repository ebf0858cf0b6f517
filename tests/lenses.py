"""Tiny checkpoints to look into: random GPT-2s that think, under two kinds of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coconut.inside.lens import Lens
from coconut.text.tiktoken import TiktokenTokenizer, prosqa_encoding
from coconut.text.tokenizer import END_OF_TEXT, Tokenizer

QUESTION = (
    "Every wumpus is a lempus. Tom is a wumpus. Every lempus is a zumpus. Sam is a rempus."
    " Tom is a jompus. Is Tom a zumpus or rempus?"
)
ANSWER = "Tom is a zumpus."
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_pairs() -> Tokenizer:
    """Like GPT-2's encoding but small: a concept is several tokens, the lead none of them."""
    merges = ["us", "mp", "Ev", "er", "ery", "Every", "##", "###", "om", "Tom", " l", " a", "is"]
    merges += [" is", " w", "um", "ump"]
    tokens = [bytes([b]) for b in range(256)] + [merge.encode() for merge in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return TiktokenTokenizer("pairs", GPT2_PATTERN, ranks, {END_OF_TEXT: len(ranks)})


TOKENIZERS = {"statements": prosqa_encoding, "pairs": byte_pairs}


def write_checkpoint(path: Path, kind: str, n_thoughts: int = 3, **coconut: Any) -> Path:
    """A random GPT-2 of two layers with a tokenizer of TOKENIZERS, as a checkpoint directory."""
    path.mkdir()
    tokenizer = TOKENIZERS[kind]().with_latents()
    tokenizer.save(path)
    V, D, P, n_layer = len(tokenizer), 32, 448, 2
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D), "wpe.weight": (P, D)}
    for layer in range(n_layer):
        h = f"h.{layer}"
        shapes |= {f"{h}.{n}.{w}": (D,) for n in ("ln_1", "ln_2") for w in ("weight", "bias")}
        shapes |= {f"{h}.attn.c_attn.weight": (D, 3 * D), f"{h}.attn.c_attn.bias": (3 * D,)}
        shapes |= {f"{h}.attn.c_proj.weight": (D, D), f"{h}.attn.c_proj.bias": (D,)}
        shapes |= {f"{h}.mlp.c_fc.weight": (D, 4 * D), f"{h}.mlp.c_fc.bias": (4 * D,)}
        shapes |= {f"{h}.mlp.c_proj.weight": (4 * D, D), f"{h}.mlp.c_proj.bias": (D,)}
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    rng = np.random.default_rng(5)
    weights = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}
    for name in weights:
        if name.endswith("weight") and weights[name].ndim == 1:
            weights[name] += 1
    save_file(weights, path / "model.safetensors")
    config = {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_embd": D,
        "n_positions": P,
        "n_layer": n_layer,
        "n_head": 4,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    made_with = {
        "format_version": 1,
        "method": "coconut",
        "feedback": "last",
        "stage": n_thoughts + 1,
        "c_thought": 1,
        "max_latent_stage": n_thoughts,
        "pad_latent_to_max": True,
        "latent_ids": [tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id],
    }
    (path / "coconut.json").write_text(json.dumps(made_with | coconut))
    return path


def open_lens(twin: ModuleType, directory: Path, n_thoughts: int | None = None) -> Lens:
    """The checkpoint opened by a twin."""
    return Lens(directory, twin.run.make_backend, n_thoughts)
