"""LoRA and DoRA beside a frozen base: training, files, the base alone, fusing."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from golden_models import MODELS, TOKENS, ragged_batch
from test_latro import random_rollouts

from coconut.batches.rollouts import collate_rollouts
from coconut.checkpoints.adapter_files import fingerprint
from coconut.checkpoints.adapters import Adapter, n_trained, trained_shapes
from coconut.checkpoints.model_files import save_config
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.errors import UserError

GPT2, QWEN2, UNTIED = "gpt2-tiny", "qwen2-tiny", "qwen2-tiny-untied"
ROWS = (TOKENS["start"], TOKENS["end"], TOKENS["latent"])
KINDS = ("lora", "dora")

# Relative; behind each the largest gap seen on x86-64.
SAME_LOSS = 2e-6  # 1.2e-7
FUSED_LOSS = 1e-5  # 4.9e-7
CURVE = 1e-4  # 1.7e-6

needs_both = pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")


def base_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def source(directory: Path, lora: Lora | None = None, saved: Path | None = None, **keys: Any):
    adapter = None
    if lora is not None:
        base = str(directory)
        adapter = Adapter(lora, ROWS, base, fingerprint(directory), range(0), saved)
    config = base_config(directory)
    keys = {"vocab_size": config["vocab_size"], "new_tokens": range(0), "copy_from": None} | keys
    return Source(config=config, directory=directory, adapter=adapter, **keys)


def backend(twin: ModuleType, name: str | Path, lora: Lora | None, saved=None, **keys: Any) -> Any:
    config = RunConfig(method="coconut", **keys)
    return twin.run.make_backend(config, source(MODELS / name, lora, saved))


def train(engine: Any, n_updates: int, lr: float = 1e-2, n_batches: int = 2) -> list[float]:
    """Losses of updates of two micro-batches each, on few shapes, as MLX traces each."""
    batches = [ragged_batch(0), ragged_batch(1, (2, 0, 1))][:n_batches]
    return [engine.train_step(batches, lr, (0, u)).loss for u in range(n_updates)]


def loss(engine: Any, seed: int = 2) -> float:
    return engine.eval_loss(ragged_batch(seed)).loss_sum


@pytest.mark.parametrize("name", [GPT2, UNTIED])
@pytest.mark.parametrize("kind", few(KINDS, 1))
def test_a_fresh_adapter_changes_nothing(twin, name, kind):
    plain, adapted = backend(twin, name, None), backend(twin, name, Lora(type=kind))
    assert loss(adapted) == pytest.approx(loss(plain), rel=SAME_LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [GPT2, UNTIED])
def test_only_adapters_and_marker_rows_are_trained(twin, name):
    engine = backend(twin, name, Lora(rank=2), weight_decay=0.1)
    before = engine.weights()
    with engine.without_adapters():
        base = loss(engine)
    train(engine, 2)
    after = engine.weights()
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    linear = {n for n in before if "proj.weight" in n or "c_attn.weight" in n or "c_fc.weight" in n}
    vocabulary = set(engine.module.VOCABULARY_ROWS) & before.keys()
    assert changed == linear | vocabulary
    for matrix in vocabulary:
        rows = np.flatnonzero((before[matrix] != after[matrix]).any(axis=1))
        assert rows.tolist() == sorted(ROWS)
    with engine.without_adapters():
        assert loss(engine) == base  # the frozen weights are bit for bit what they were


@pytest.mark.slow
@pytest.mark.compiled
def test_the_base_alone_and_the_adapted_model_take_turns(twin):
    engine = backend(twin, GPT2, Lora(rank=2))
    base = loss(engine)
    train(engine, 3)
    adapted = loss(engine)
    with engine.without_adapters():
        assert loss(engine) == pytest.approx(base, rel=SAME_LOSS)
    assert loss(engine) == adapted != pytest.approx(base, rel=1e-3)
    train(engine, 1)  # training goes on
    assert loss(engine) != adapted


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [(GPT2, "lora"), (UNTIED, "dora")])
def test_fused_weights_compute_what_the_adapted_model_does(twin, name, kind, tmp_path):
    engine = backend(twin, name, Lora(type=kind, rank=3))
    train(engine, 3, n_batches=1)
    config = base_config(MODELS / name)
    save_config(config, engine.model.args, tmp_path)
    from safetensors.numpy import save_file

    weights = {n: np.ascontiguousarray(w) for n, w in engine.weights().items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert loss(backend(twin, tmp_path, None)) == pytest.approx(loss(engine), rel=FUSED_LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_goes_on_bit_for_bit(twin, kind, tmp_path):
    lora = Lora(type=kind, rank=2, scale=3.0, layers=1, targets=["c_attn"])
    engine = backend(twin, GPT2, lora)
    train(engine, 2)
    engine.save(tmp_path, with_optimizer=True)
    expected = train(engine, 2)
    again = backend(twin, GPT2, lora, saved=tmp_path)
    again.load_optimizer(tmp_path)
    assert train(again, 2) == expected


@needs_both
# Not qwen2-tiny: there float32 alone is 3e-4 away from float64 after 20 steps.
@pytest.mark.parametrize(
    "name, kind", [(GPT2, "dora"), pytest.param(UNTIED, "lora", marks=pytest.mark.slow)]
)
@pytest.mark.compiled
@pytest.mark.slow
def test_twins_follow_one_curve_and_read_each_others_adapters(name, kind, tmp_path):
    lora = Lora(type=kind, rank=4)
    engines = [backend(load_twin(t), name, lora, max_grad_norm=1.0) for t in ("mlx", "cuda")]
    ours, theirs = (np.array(train(engine, 20, 1e-3, 1)) for engine in engines)
    assert ours[-1] < 0.9 * ours[0]
    assert np.abs(ours / theirs - 1).max() < CURVE
    rest = []
    for engine, other in zip(engines, ("cuda", "mlx"), strict=True):
        folder = tmp_path / other
        folder.mkdir()
        engine.save(folder, with_optimizer=True)
        went_on = backend(load_twin(other), name, lora, saved=folder, max_grad_norm=1.0)
        went_on.load_optimizer(folder)
        rest += [train(went_on, 5, 1e-3, 1), train(engine, 5, 1e-3, 1)]
    for curve in rest:
        assert np.abs(np.array(curve) / rest[0] - 1).max() < CURVE


@pytest.mark.parametrize("name", [GPT2, QWEN2])
@pytest.mark.slow
def test_recomputed_blocks_give_the_same_training(twin, name):
    lora = Lora(rank=2, dropout=0.3)
    kept, recomputed = (
        train(backend(twin, name, lora, gradient_checkpointing=c), 3) for c in (False, True)
    )
    assert recomputed == pytest.approx(kept, rel=SAME_LOSS)


@pytest.mark.slow
@pytest.mark.compiled
def test_adapter_dropout_differs_between_updates_and_is_off_in_evaluation(twin):
    engine = backend(twin, QWEN2, Lora(rank=2, dropout=0.5))
    train(engine, 2)
    once = [engine.train_step([ragged_batch(0)], 0.0, key).loss for key in ((1, 1), (1, 1), (1, 2))]
    assert once[0] == once[1] != once[2]
    whole = backend(twin, QWEN2, Lora(rank=2))
    train(whole, 2)
    assert loss(engine) == loss(engine)


@pytest.mark.slow
def test_bfloat16_trains_adapters_in_float32(twin):
    exact, rough = (backend(twin, GPT2, Lora(rank=2), bf16=bf16) for bf16 in (False, True))
    a, b = train(exact, 3), train(rough, 3)
    assert a == pytest.approx(b, rel=2e-2) and a != b
    assert all(w.dtype == np.float32 for w in rough.weights().values())


def test_latro_trains_an_adapter_against_the_base_alone(twin):
    engine = backend(twin, GPT2, Lora(rank=2))
    rollouts = random_rollouts(4, latents=1)
    batch = collate_rollouts(rollouts, TOKENS["latro_pad"])
    engine.keep_reference()
    before = engine.score(batch).logprobs
    weighted = collate_rollouts(
        rollouts, TOKENS["latro_pad"], advantages=[1.0, -1.0, 0.5, -0.5], n_rows=4
    )
    for _ in range(2):
        engine.policy_step([weighted], 1e-2)
    after = engine.score(batch).logprobs
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_array_equal(engine.score(batch, of_reference=True).logprobs, before)
    with engine.without_adapters():
        np.testing.assert_allclose(engine.score(batch).logprobs, before, atol=1e-5)


def weight_bytes(twin: ModuleType, engine: Any) -> int:
    """Memory of all weights that a policy and its reference hold, shared ones once."""
    if twin.__name__ == "mlx_coconut":
        import mlx.core as mx

        gc.collect()
        return mx.get_active_memory()
    models = [engine.model, engine.policy.reference]
    parameters = [p for model in models if model is not None for p in model.parameters()]
    return sum({p.data_ptr(): p.nbytes for p in parameters}.values())


@pytest.mark.parametrize("lora", [Lora(rank=1, targets=["c_attn"]), None])
@pytest.mark.slow
def test_a_reference_beside_an_adapter_costs_no_second_copy_of_the_base(twin, lora):
    engine = backend(twin, GPT2, lora)
    batch = collate_rollouts(
        random_rollouts(2), TOKENS["latro_pad"], advantages=[1.0, -1.0], n_rows=2
    )

    def update() -> int:
        # The second one compiles nothing anew, so that only weights can have come.
        engine.policy_step([batch], 1e-2)
        engine.score(batch, of_reference=engine.policy.reference is not None)
        return weight_bytes(twin, engine)

    update()
    before = update()
    engine.keep_reference()
    grown = update() - before
    base = engine.n_params * 4
    # MLX's count holds more than the weights: 2.6 % of these tiny ones was seen.
    assert 0 < grown < 0.2 * base if lora else grown == pytest.approx(base, rel=0.05)


def test_a_run_goes_back_to_an_adapter_it_saved(twin, tmp_path):
    engine = backend(twin, GPT2, Lora(rank=2))
    train(engine, 1, n_batches=1)
    engine.save(tmp_path, with_optimizer=False)
    saved = loss(engine)
    train(engine, 1, n_batches=1)
    assert loss(engine) != saved
    engine.restore(tmp_path)
    assert loss(engine) == saved


@pytest.mark.parametrize("name", [GPT2, UNTIED])
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_made_without_a_model_is_the_models(twin, name, kind):
    lora = Lora(type=kind, rank=3, layers=1)
    config = base_config(MODELS / name)
    assert n_trained(config, lora, len(ROWS)) == backend(twin, name, lora).n_trained


def test_targets_select_layers_by_their_ending():
    config = base_config(MODELS / GPT2)
    shapes = trained_shapes(config, Lora(targets=["c_proj"], layers=1), 0)
    last = config["n_layer"] - 1
    paths = {n.rsplit(".", 1)[0] for n in shapes}
    assert paths == {f"h.{last}.attn.c_proj", f"h.{last}.mlp.c_proj"}


@pytest.mark.parametrize(
    "lora, complaint",
    [
        (
            Lora(targets=["q_proj"]),
            "q_proj: no linear layer of a gpt2 block; there are attn.c_attn",
        ),
        (Lora(targets=["attn"]), "attn: no linear layer"),
        (Lora(layers=99), "blocks, fewer than 99"),
        (Lora(quantize=4, group_size=128), "128 does not divide the inputs of attn.c_attn"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(lora, complaint):
    with pytest.raises(UserError, match=complaint):
        trained_shapes(base_config(MODELS / GPT2), lora, 0)
