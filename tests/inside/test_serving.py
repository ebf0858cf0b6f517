"""Every kind of checkpoint answers on the page, asked from three threads at once."""

from __future__ import annotations

import argparse
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import few
from test_page import ask
from tiny import run_config, start

from coconut.inside.inspect import Asked, look
from coconut.inside.lens import Lens
from coconut.inside.page import serve
from coconut.inside.page.page import page_item

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 320,
    "tie_word_embeddings": True,
    "vocab_size": 200,
}
LORA = {"rank": 2, "targets": ["attn.c_attn"]}
KINDS: dict[str, dict[str, Any]] = {
    "trained rule": {"feedback": "last|mlp:4"},
    "plain": {},
    "inverse of the head": {"feedback": "suppressed:space=vocab"},
    "adapter": {"lora": LORA},
    "quantised": {"lora": LORA | {"quantize": 8, "group_size": 32}},
    "qwen2": {"model": LLAMA_LIKE | {"model_type": "qwen2"}},
    "borrowed": {"model": LLAMA_LIKE | {"model_type": "llama"}},
}
"""What a run of each kind says beside the tiny run's keys; `model`: its config.json."""

QUESTIONS = [
    "Tom is a lempus. Every lempus is a zumpus. Is Tom a jompus or zumpus?",
    "Every wumpus is a lempus. Tom is a wumpus. Is Tom a lempus or rempus?",
    "Sam is a rempus. Is Sam a jompus or rempus?",
]


def made(twin: ModuleType, folder: Path, model: Any = None, lora: Any = None, **keys: Any) -> Path:
    """A checkpoint of one epoch on eight items; of an adapter beside such a one."""
    if model:
        (folder / "model.json").write_text(json.dumps(model))
        keys["model_config_path"] = str(folder / "model.json")
    config = run_config(folder, num_epochs=1, **keys)
    start(twin, config).train()
    if lora:
        base = {"model_id": str(config.run_dir / "epoch_01"), "model_config_path": None}
        keys |= base | {"lora": lora, "tokenizer": None}
        config = run_config(folder, num_epochs=1, name="adapter", **keys)
        start(twin, config).train()
    return config.run_dir / "epoch_01"


@pytest.mark.parametrize("kind", few(KINDS, 1))
def test_three_threads_at_once_are_told_what_one_is(twin, tmp_path, kind):
    if kind == "quantised" and twin.__name__ == "cuda_coconut":
        pytest.skip("the torch twin quantises on CUDA alone")
    checkpoint = made(twin, tmp_path, **KINDS[kind])
    options = argparse.Namespace(
        model=str(checkpoint), base=None, data=None, idx=None, question=None, latents=2,
        max_new_tokens=2, top=3, port=0,
    )  # fmt: skip
    with serve.open_server(twin.__name__, twin.run.make_backend, options) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with ThreadPoolExecutor(3) as threads:
            replies = list(threads.map(lambda question: ask(server, question), 3 * QUESTIONS))
        server.shutdown()
    lens = Lens(checkpoint, twin.run.make_backend, 2)
    expected = [page_item(look(lens, Asked(question), options)) for question in QUESTIONS]
    for i, (status, text) in enumerate(replies):
        assert status == 200, text
        assert json.loads(text) == json.loads(json.dumps(expected[i % 3]))
