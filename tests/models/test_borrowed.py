"""Models of mlx_lm and transformers in our latent passes: the same numbers as in their own code."""

from __future__ import annotations

import importlib
import json
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
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
from tiny import assert_same_gradients, read_log, rows_of, run_config, start

from coconut.batches.batch import collate
from coconut.batches.decoding import Decoding
from coconut.checkpoints.adapter_files import fingerprint
from coconut.checkpoints.adapters import Adapter, trained_shapes
from coconut.checkpoints.architectures import TRIED, check_architecture, n_positions, resolved
from coconut.checkpoints.checkpoint import describe
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.feedback.weights import Setup
from coconut.plan.memory import shape_of

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


@pytest.mark.parametrize("model_type", few(TRIED, 2))
def test_logits_equal_the_librarys_own(twin, directories, model_type):
    path = directories(model_type)
    model, _, _ = twin.weights.load_model(path)
    rows = rows_of(ragged_batch(1, (0, 0, 0)))
    batch = collate(rows, EOS)
    state = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), batch.first_latent, 0)
    logits = to_numpy(model.head(state.hidden))
    for i, row in enumerate(rows):
        assert_close(logits[i][batch.mask[i]], library_logits(twin, path, row.ids))


@pytest.mark.parametrize("model_type", few(TRIED, 2))
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


@pytest.mark.parametrize("model_type", few(["llama", "gemma2", "gemma3_text", "smollm3"], 1))
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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_recomputed_blocks_give_the_same_gradients(twin, directories, model_type):
    path, batch = directories(model_type), ragged_batch(5, (2, 0))
    kept, recomputed = (run_model(twin, path, batch, checkpointing=c) for c in (False, True))
    assert kept.loss == pytest.approx(recomputed.loss, rel=LOSS)
    assert_same_gradients(recomputed.grads, kept.grads, GRADIENTS)


@both
@pytest.mark.parametrize("model_type", few(TRIED, 2))
def test_the_twins_agree_on_loss_thoughts_and_gradients(directories, model_type):
    # Of a width whose root is no bfloat16 number, which Gemma 3 multiplies by.
    path, batch = directories(model_type, hidden_size=48), ragged_batch(6)
    ours, theirs = (run_model(load_twin(name), path, batch) for name in ("mlx", "cuda"))
    assert ours.loss == pytest.approx(theirs.loss, rel=LOSS)
    assert_close(ours.logits[batch.mask], theirs.logits[batch.mask])
    assert_same_gradients(ours.grads, theirs.grads, GRADIENTS)


@pytest.mark.parametrize("model_type", few(["llama", "gemma2", "gemma3_text"], 1))
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


# ---- training, files, the rest of the program


def backend(
    twin, path: Path, lora: Lora | None = None, rule: str | None = None, saved=None, **keys
):
    config = describe(path)["config"]
    markers = (TOKENS["start"], TOKENS["end"], TOKENS["latent"])
    adapter = None
    if lora is not None:
        adapter = Adapter(lora, markers, str(path), fingerprint(path), range(0), saved)
    setup = None if rule is None else Setup(parse(rule), markers, EOS, 200)
    source = Source(config, path, config["vocab_size"], range(0), None, setup, adapter)
    return twin.run.make_backend(RunConfig(method="coconut", **keys), source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", few(["whole", "lora"], 1))
@pytest.mark.compiled
def test_training_reduces_the_loss_of_eight_items(twin, directories, kind):
    lora = Lora(rank=4, dropout=0.1) if kind == "lora" else None
    engine = backend(twin, directories("llama"), lora)
    batch = ragged_batch(1, (1, 0, 3, 2, 2, 0, 1, 1))
    losses = [engine.train_step([batch], 1e-2, (0, u)).loss for u in range(10)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_recomputed_blocks_drop_what_their_adapters_dropped(twin, directories):
    path, lora = directories("llama"), Lora(rank=2, dropout=0.3)
    engines = [backend(twin, path, lora, gradient_checkpointing=c) for c in (False, True)]
    kept, recomputed = (
        [engine.train_step([ragged_batch(1)], 1e-2, (0, u)).loss for u in range(4)]
        for engine in engines
    )
    assert recomputed == pytest.approx(kept, rel=LOSS)


@both
@pytest.mark.slow
def test_a_run_stopped_in_one_twin_goes_on_in_the_other(tmp_path):
    config = described("gemma3_text", max_position_embeddings=256)
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        del config[name]
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config))
    keys = {"model_config_path": str(path), "batch_size_training": 4}
    curves = []
    for name, order in (("unbroken", ("mlx", "mlx")), ("handed-over", ("mlx", "cuda"))):
        for epochs, twin in zip((1, 2), order, strict=True):
            one = run_config(tmp_path, name=name, num_epochs=epochs, **keys)
            start(load_twin(twin), one).train()
        curves.append([record["loss"] for record in read_log(one, "train")])
    assert len(curves[0]) == 4
    # Adam divides by the root of the second moment, which magnifies the noise of the gradients.
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)  # 1e-6


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_a_saved_checkpoint_opens_in_the_library_with_the_same_logits(
    twin, directories, tmp_path, model_type
):
    engine = backend(twin, directories(model_type))
    engine.save(tmp_path, with_optimizer=False)
    batch = ragged_batch(1, (0,))
    model, _, _ = twin.weights.load_model(tmp_path)
    ours = run_logits(twin, model, batch)[0]
    assert_close(ours, library_logits(twin, tmp_path, rows_of(batch)[0].ids))


@pytest.mark.parametrize("model_type", few(["llama", "phi3", "gemma3_text"], 1))
def test_adapters_train_what_the_plan_counts_and_are_fused_to_the_same_model(
    twin, directories, tmp_path, model_type
):
    path = directories(model_type)
    engine = backend(twin, path, Lora(rank=2, type="dora"))
    shapes = trained_shapes(describe(path)["config"], Lora(rank=2, type="dora"), 3)
    assert engine.n_trained == sum(int(np.prod(shape)) for shape in shapes.values())
    engine.train_step([ragged_batch(1)], 1e-2, (0, 0))
    for kind, write in (("own", engine.save), ("fused", engine.save_fused)):
        (tmp_path / kind).mkdir()
        write(tmp_path / kind, **({"with_optimizer": False} if kind == "own" else {}))
    read = backend(twin, path, Lora(rank=2, type="dora"), saved=tmp_path / "own")
    engines = (engine, read, backend(twin, tmp_path / "fused"))
    losses = [e.eval_loss(ragged_batch(2)).loss_sum for e in engines]
    # What is fused is another order of sums: float noise of about 1e-6.
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


@both
@pytest.mark.parametrize(
    "rule",
    [
        *("layer:-1|final_norm", "layer:1|rms", "soft:tau=0.7", "prev_input|rms", "last|ln"),
        *("token", "last+suppressed:0:|rms", "suppressed:0:,space=vocab|rms"),
    ],
)
def test_feedback_rules_give_both_twins_the_same_loss(directories, rule):
    path = directories("gemma3_text", hidden_size=48)
    engines = [backend(load_twin(name), path, rule=rule) for name in ("mlx", "cuda")]
    losses = [engine.eval_loss(ragged_batch(2)).loss_sum for engine in engines]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_final_norm_applied_to_the_last_block_is_the_last_state(twin, directories, model_type):
    path = directories(model_type)
    losses = [
        backend(twin, path, rule=rule).eval_loss(ragged_batch(2)).loss_sum
        for rule in ("last", "layer:-1|final_norm", "zero")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


def test_a_thought_of_gemma_enters_at_the_scale_that_the_first_block_reads(twin, directories):
    model, _, _ = twin.weights.load_model(directories("gemma3_text", hidden_size=48))
    table = to_numpy(model.embed_tokens.weight)
    array = mlx_array if twin.__name__ == "mlx_coconut" else torch_array
    row = to_numpy(model.embed(array(np.array([[7]]))))[0, 0]
    # sqrt(48), rounded to bfloat16 as in training.
    np.testing.assert_allclose(row, 6.9375 * table[7], rtol=1e-6)
    np.testing.assert_allclose(to_numpy(model.embedding)[7], row, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen2-tiny", "qwen2-tiny-untied"])
def test_a_borrowed_qwen2_computes_what_the_hand_written_one_does(twin, name, monkeypatch):
    batch = ragged_batch(3)
    ours = run_model(twin, name, batch)
    package = importlib.import_module(f"{twin.__name__}.models")
    monkeypatch.setattr(package, "HAND_WRITTEN", ())
    borrowed = run_model(twin, name, batch)
    assert borrowed.loss == pytest.approx(ours.loss, rel=LOSS)
    assert_close(borrowed.logits[batch.mask], ours.logits[batch.mask])
    assert_same_gradients(borrowed.grads, ours.grads, GRADIENTS)


@both
def test_attention_looked_into_is_the_same_in_both_twins_or_refused(directories):
    batch = collate([as_row(0, [5, 6, 111, 30, 30, 86], None)], EOS)
    for model_type in ("llama", "gemma3_text"):
        path = directories(model_type)
        ours, theirs = (backend(load_twin(n), path).trace(batch) for n in ("mlx", "cuda"))
        np.testing.assert_allclose(ours.attention.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(ours.attention, theirs.attention, atol=1e-5)
    for name in ("mlx", "cuda"):
        with pytest.raises(UserError, match=r"'gemma2'.*cannot be looked into"):
            backend(load_twin(name), directories("gemma2")).trace(batch)


# ---- what is refused


REFUSED = {
    "gemma 1": ({"model_type": "gemma"}, "take a Gemma 2 or 3"),
    "mamba": ({"model_type": "mamba", "state_size": 16}, "recurrent layers"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 4}, "a mixture of experts"),
    "a quantised base": ({"quantization": {"bits": 4, "group_size": 64}}, "take its float model"),
    "a model that sees": ({"text_config": {}}, "it sees images too"),
    "no causal model": (
        {"architectures": ["LlamaForTokenClassification"]},
        "there are gpt2, qwen2",
    ),
    "dropout": ({"attention_dropout": 0.1}, "set attention_dropout to 0"),
    "another activation": ({"hidden_act": "relu"}, "only with silu"),
    "growing positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type dynamic"),
    "linear attention": ({"layer_types": ["linear_attention"] * 2}, "type linear_attention"),
    "a name unknown": ({"model_type": "llama9"}, "neither hand-written here"),
    "no name": ({"model_type": "../llama"}, "there are gpt2, qwen2"),
    "a wrong number": ({"hidden_size": "wide"}, "hidden_size: expected a whole number above 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(twin, what):
    changes, message = REFUSED[what]
    config = described("llama") | {"architectures": ["LlamaForCausalLM"]} | changes
    with pytest.raises(UserError) as refused:
        twin.models.build(config, "x.json")
    (problem,) = refused.value.problems
    assert refused.value.where == "x.json"
    assert message in problem and "\n" not in problem and len(problem) < 220


def test_without_transformers_the_torch_twin_says_what_to_install(monkeypatch):
    if "cuda" not in CHOSEN:
        pytest.skip("TWINS does not name cuda")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install 'transformers>=5"):
        load_twin("cuda").models.build(described("llama"), "x.json")


def test_parts_that_compute_something_else_are_noticed(twin, directories, monkeypatch):
    twin.weights.load_model(directories("llama"))
    borrowed = importlib.import_module(f"{twin.__name__}.models.borrowed")
    # As if the library ignored the mask: pads on the left are seen.
    monkeypatch.setattr(borrowed, "additive_mask", lambda keys, *a: 0 * masks(keys, *a))
    masks = twin.models.base.additive_mask
    with pytest.raises(UserError, match="computes other logits"):
        twin.weights.load_model(directories("llama"))


# ---- config.json


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_transformers_newer_spelling_is_the_same_model(twin, directories, tmp_path, model_type):
    old = directories(model_type, rope_theta=500.0)
    config = json.loads((old / "config.json").read_text())
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
        del config["sliding_window_pattern"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    (tmp_path / "model.safetensors").symlink_to(old / "model.safetensors")
    batch = ragged_batch(1, (0, 2))
    ours, theirs = (run_model(twin, path, batch).logits for path in (tmp_path, old))
    np.testing.assert_array_equal(ours, theirs)
    assert resolved(resolved(config)) == resolved(config)


def test_a_window_that_is_not_kept_to_limits_the_positions():
    assert n_positions(described("mistral", sliding_window=32)) == 32
    assert n_positions(described("mistral", sliding_window=None)) == 64
    assert n_positions(described("qwen3", sliding_window=32, use_sliding_window=False)) == 64
    assert n_positions(described("gemma3_text")) == 64  # which both libraries keep to


@pytest.mark.parametrize("model_type", few(TRIED, 2))
def test_the_plan_knows_the_size_of_a_borrowed_model(directories, model_type):
    found = describe(directories(model_type))
    shape = shape_of(found["config"], found["config"]["vocab_size"], "x")
    n = sum(int(np.prod(t.shape)) for t in found["tensors"].values())
    assert shape.n_params == pytest.approx(n, rel=0.01)  # but for further norms
    check_architecture(found["config"], "x")
