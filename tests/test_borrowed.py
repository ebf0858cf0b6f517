"""Models of mlx_lm and transformers in our latent passes: the same numbers as in their own code."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from golden_models import (
    TOKENS,
    as_row,
    mlx_array,
    ragged_batch,
    run_model,
    to_numpy,
    torch_array,
)
from safetensors.numpy import save_file
from tiny import assert_same_gradients, rows_of

from coconut.architectures import TRIED
from coconut.backend import Decoding
from coconut.batch import collate

EOS = TOKENS["eos"]
LLAMA_LIKE = {
    "vocab_size": 208,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": TOKENS["eos"],
    "pad_token_id": None,
}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 24, "sliding_window": None},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "gemma2": GEMMA | {"query_pre_attn_scalar": 24, "sliding_window": 64},
    # Rows are longer than the window, so that it matters.
    "gemma3_text": GEMMA
    | {"query_pre_attn_scalar": 24, "sliding_window": 4, "sliding_window_pattern": 2}
    | {"layer_types": ["sliding_attention", "full_attention"], "rope_local_base_freq": 500.0},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    | {"attention_multiplier": 0.3, "attention_bias": False, "mlp_bias": False},
}
"""A config.json of each model type, with what makes it itself."""

# Behind each tolerance the largest gap seen on x86-64, of the largest logit.
LOGITS = 2e-5  # 2e-6
LOSS = 1e-5  # relative; 5e-7
GRADIENTS = 2e-4  # of a tensor's norm; 2e-5

both = pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")


def described(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type} | LLAMA_LIKE | TINY[model_type] | changes


def names_and_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's tensors, as one of the twins builds the model."""
    twin = load_twin(CHOSEN[0])
    model, module = twin.models.build(config, "config.json")
    return {n: tuple(w.shape) for n, w in twin.weights.hf_weights(model, module).items()}


def weights_for(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Numbers by name alone, large enough that every part of a block shows in the logits."""
    out = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        out[name] = (rng.standard_normal(shape) * 0.15).astype(np.float32)
        if len(shape) == 1:
            out[name] += np.float32(0.8)
    return out


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Gives the directory of a tiny random model, made once a test module."""
    folder = tmp_path_factory.mktemp("borrowed")

    @cache
    def make(model_type: str, **changes: Any) -> Path:
        config = described(model_type, **changes)
        path = folder / f"{model_type}-{zlib.crc32(json.dumps(config).encode())}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        save_file(weights_for(names_and_shapes(config)), path / "model.safetensors")
        return path

    return make


def library_logits(twin, path: Path, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of the library's own class, which has never seen our code."""
    if twin.__name__ == "mlx_coconut":
        import mlx.core as mx
        from mlx_lm.utils import load_model

        model, _ = load_model(path, lazy=True)
        return np.array(model(mx.array([ids]))[0].astype(mx.float32))
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = LOGITS) -> None:
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("model_type", TRIED)
def test_logits_equal_the_librarys_own(twin, directories, model_type):
    path = directories(model_type)
    model, _, _ = twin.weights.load_model(path)
    rows = rows_of(ragged_batch(1, (0, 0, 0)))
    batch = collate(rows, EOS)
    state = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), batch.first_latent, 0)
    logits = to_numpy(model.head(state.hidden))
    for i, row in enumerate(rows):
        assert_close(logits[i][batch.mask[i]], library_logits(twin, path, row.ids))


@pytest.mark.parametrize("model_type", TRIED)
def test_padded_batch_equals_its_rows_alone(twin, directories, model_type):
    path = directories(model_type)
    batch = ragged_batch(3)
    assert not batch.mask[:, 0].all()  # pads on the left
    rows = rows_of(batch)
    whole = run_model(twin, path, batch)
    loss, total = 0.0, dict.fromkeys(whole.grads, 0.0)
    for i, row in enumerate(rows):
        single = collate([row], EOS)
        alone = run_model(twin, path, single)
        assert_close(whole.logits[i][batch.mask[i]], alone.logits[0])
        share = single.n_targets / batch.n_targets
        loss += alone.loss * share
        total = {n: total[n] + g * share for n, g in alone.grads.items()}
    assert whole.loss == pytest.approx(loss, rel=LOSS)
    assert_same_gradients(whole.grads, total, GRADIENTS)


@pytest.mark.parametrize("model_type", TRIED)
def test_latent_passes_equal_recomputing_everything_for_each_thought(twin, directories, model_type):
    path = directories(model_type)
    model, _, _ = twin.weights.load_model(path)
    array = mlx_array if twin.__name__ == "mlx_coconut" else torch_array
    for row in rows_of(ragged_batch(4, (3, 1))):
        batch = collate([row], EOS)
        passes = run_model(twin, path, batch)
        x = to_numpy(model.embed(array(batch.ids))).copy()
        for column in range(row.first_latent, row.first_latent + row.n_latents):
            x[:, column] = uncached(twin, model, x)[:, column - 1]
        whole = to_numpy(model.head(array(uncached(twin, model, x))))
        assert_close(passes.logits[0], whole[0])


def uncached(twin, model, x: np.ndarray) -> np.ndarray:
    """States (1, T, D) of all columns of one unpadded row, computed at once."""
    array = mlx_array if twin.__name__ == "mlx_coconut" else torch_array
    ones = array(np.ones(x.shape[:2], bool))
    positions = array(np.arange(x.shape[1])[None])
    inputs = array(x)
    mask = twin.models.base.additive_mask(ones, 0, x.shape[1], inputs.dtype)
    return to_numpy(model.trunk(inputs, positions, mask))


@pytest.mark.parametrize("model_type", TRIED)
def test_recomputed_blocks_give_the_same_gradients(twin, directories, model_type):
    path, batch = directories(model_type), ragged_batch(5, (2, 0))
    kept, recomputed = (run_model(twin, path, batch, checkpointing=c) for c in (False, True))
    assert kept.loss == pytest.approx(recomputed.loss, rel=LOSS)
    assert_same_gradients(recomputed.grads, kept.grads, GRADIENTS)


@both
@pytest.mark.parametrize("model_type", TRIED)
def test_the_twins_agree_on_loss_thoughts_and_gradients(directories, model_type):
    # Of a width whose root is no bfloat16 number, which Gemma 3 multiplies by.
    path, batch = directories(model_type, hidden_size=48), ragged_batch(6)
    ours, theirs = (run_model(load_twin(name), path, batch) for name in ("mlx", "cuda"))
    assert ours.loss == pytest.approx(theirs.loss, rel=LOSS)
    assert_close(ours.logits[batch.mask], theirs.logits[batch.mask])
    assert_same_gradients(ours.grads, theirs.grads, GRADIENTS)


@pytest.mark.parametrize("model_type", TRIED)
def test_batched_decoding_equals_reading_all_again_for_each_token(twin, directories, model_type):
    path = directories(model_type)
    model, _, _ = twin.weights.load_model(path)
    rows = rows_of(ragged_batch(2, (2, 1, 3)))
    prompts = [as_row(r.idx, r.ids[: r.first_latent + r.n_latents + 1], None) for r in rows]
    batch = collate(prompts, EOS)
    written = twin.generate.generate(model, batch, batch.n_passes, Decoding(6, EOS))
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = list(prompt.ids)
        for token in tokens:
            logits = run_logits(twin, model, collate([as_row(0, ids, None)], EOS))
            assert token == logits[0, -1].argmax()
            ids.append(token)


def run_logits(twin, model, batch) -> np.ndarray:
    plan = (batch.first_latent, batch.n_passes)
    state = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), *plan)
    return to_numpy(model.head(state.hidden))
