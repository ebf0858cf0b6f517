"""The latent passes against the slow oracle, alone and in batches, with and without dropout."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from golden_models import TOKENS, as_row, ragged_batch, to_numpy
from safetensors.numpy import load_file
from tiny import (
    MODEL,
    assert_same_gradients,
    dropout,
    dropout_key,
    gradient_scale,
    gradients,
    model_directory,
    rows_of,
)

from coconut.batches.batch import Batch, collate
from coconut.batches.curriculum import IGNORED
from coconut.checkpoints.model_files import save_weights

EOS, LATENT = TOKENS["eos"], TOKENS["latent"]

# Behind each tolerance the largest gap seen on x86-64.
LOGITS = 5e-5  # 6.4e-6
LOSS = 2e-6  # relative; 1.6e-7
GRADIENTS = 2e-5  # of a tensor's norm; 2.1e-6
DIFFERENCES = 5e-6  # of a tensor's norm; 4.6e-7
DIFFERENCE_STEP = 1e-5


def forward(twin, directory, batch: Batch, n_passes: int | None = None, key=None):
    """(logits, thoughts) as numpy."""
    model, _, _ = twin.weights.load_model(directory)
    n_passes = batch.n_passes if n_passes is None else n_passes
    out = twin.latent.latent_forward(
        model, twin.latent.Inputs.of(batch), batch.first_latent, n_passes, key
    )
    return to_numpy(model.head(out.hidden)), [to_numpy(thought) for thought in out.thoughts]


# ---- the mathematics


@pytest.mark.parametrize("latents", [(0, 1, 3, 2), (6,), (0, 0)])
@pytest.mark.parametrize("pad_multiple", [1, 8])
def test_cached_passes_equal_the_uncached_oracle(twin, latents, pad_multiple):
    batch = collate(rows_of(ragged_batch(1, latents)), EOS, pad_multiple)
    ours, _ = forward(twin, MODEL, batch)
    oracle = naive.GPT2.load(MODEL)
    for row, logits, real in zip(rows_of(batch), ours, batch.mask, strict=True):
        assert np.abs(logits[real] - naive.logits(oracle, row.ids, LATENT)).max() < LOGITS


def test_loss_equals_the_oracles_over_the_targets_alone(twin):
    batch = ragged_batch(2)
    model, _, _ = twin.weights.load_model(MODEL)
    ours = twin.train.Trainer(model, weight_decay=0.0).loss(batch)
    oracle = naive.GPT2.load(MODEL)
    sums = [naive.loss_sum(oracle, row.ids, row.labels, LATENT) for row in rows_of(batch)]
    assert ours.n_targets == sum(count for _, count in sums)
    assert ours.loss_sum == pytest.approx(sum(loss for loss, _ in sums), rel=LOSS)


@pytest.mark.parametrize("pad_multiple", [1, 16])
def test_padded_batch_equals_its_rows_alone(twin, tmp_path, pad_multiple):
    rows = rows_of(ragged_batch(3))
    batch = collate(rows, EOS, pad_multiple)
    logits, _ = forward(twin, MODEL, batch)
    stats, grads = gradients(twin, MODEL, [batch], tmp_path)
    loss, total = 0.0, dict.fromkeys(grads, 0.0)
    for i, row in enumerate(rows):
        single = collate([row], EOS)
        alone, _ = forward(twin, MODEL, single)
        assert np.abs(logits[i][batch.mask[i]] - alone[0]).max() < LOGITS
        part, part_grads = gradients(twin, MODEL, [single], tmp_path)
        loss += part.loss_sum
        # A step divides by its own targets; the batch's divides by all.
        total = {
            n: total[n] + g * (part.n_targets / stats.n_targets) for n, g in part_grads.items()
        }
    assert stats.loss_sum == pytest.approx(loss, rel=LOSS)
    assert_same_gradients(grads, total, GRADIENTS)


@pytest.mark.slow
def test_gradient_through_two_latents_equals_finite_differences(twin, tmp_path):
    row = rows_of(ragged_batch(4, (2,)))[0]
    stats, grads = gradients(twin, MODEL, [collate([row], EOS)], tmp_path)
    oracle = naive.GPT2.load(MODEL)
    rng = np.random.default_rng(0)
    for name, w in oracle.weights.items():
        # The steepest direction and a random one: all entries of the gradient take part.
        for direction in (grads[name], rng.standard_normal(w.shape)):
            direction = direction / max(np.linalg.norm(direction), 1e-30)
            ends = []
            for step in (DIFFERENCE_STEP, -DIFFERENCE_STEP):
                oracle.weights[name] = w + step * direction
                ends.append(naive.loss_sum(oracle, row.ids, row.labels, LATENT)[0])
            oracle.weights[name] = w
            slope = (ends[0] - ends[1]) / (2 * DIFFERENCE_STEP) / stats.n_targets
            gap = abs(slope - (grads[name] * direction).sum())
            assert gap < DIFFERENCES * gradient_scale(grads, name), name


def test_without_latents_or_feedback_it_is_the_plain_model(twin):
    batch = ragged_batch(5, (0, 2))
    logits, thoughts = forward(twin, MODEL, batch, n_passes=0)
    assert thoughts == []
    oracle = naive.GPT2.load(MODEL)
    for row, ours, real in zip(rows_of(batch), logits, batch.mask, strict=True):
        assert np.abs(ours[real] - naive.logits(oracle, row.ids, None)).max() < LOGITS


def test_batch_without_targets_has_loss_0_and_changes_nothing(twin, tmp_path):
    rows = [as_row(r.idx, r.ids, [IGNORED] * len(r.ids)) for r in rows_of(ragged_batch(6))]
    for pad_multiple in (1, 8):
        batch = collate(rows, EOS, pad_multiple)
        stats, grads = gradients(twin, MODEL, [batch], tmp_path)
        assert (stats.loss, stats.n_targets, stats.grad_norm) == (0.0, 0, 0.0)
        assert all(not g.any() for g in grads.values())


def test_head_runs_only_where_a_label_counts(twin, tmp_path, monkeypatch):
    batch = ragged_batch(7)
    cls, seen = type(twin.weights.load_model(MODEL)[0]), []
    head = cls.head
    monkeypatch.setattr(cls, "head", lambda self, h: seen.append(h.shape[:-1]) or head(self, h))
    gradients(twin, MODEL, [batch], tmp_path)
    assert seen == [(batch.n_targets,)]


# ---- the parameters


def test_causal_mask_and_other_buffers_are_no_parameters(twin):
    model, module, _ = twin.weights.load_model(MODEL)
    names = {n.removeprefix("transformer.") for n in load_file(MODEL / "model.safetensors")}
    assert set(twin.weights.hf_weights(model, module)) == names


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_gpt2_small_has_the_published_number_of_parameters(twin, new_tokens):
    config = {"model_type": "gpt2", "vocab_size": 50257 + new_tokens, "n_positions": 1024}
    config |= {"n_embd": 768, "n_layer": 12, "n_head": 12}
    if twin.__name__ == "cuda_coconut":
        import torch

        with torch.device("meta"):  # shapes alone; MLX's are lazy by themselves
            model, module = twin.models.build(config, "test")
    else:
        model, module = twin.models.build(config, "test")
    shapes = [w.shape for w in twin.weights.hf_weights(model, module).values()]
    assert sum(map(np.prod, shapes)) == 124_439_808 + new_tokens * 768


# ---- dropout


@pytest.mark.parametrize("kind", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_kind_of_dropout_acts_on_thoughts_and_follows_its_key(twin, tmp_path, kind):
    directory = model_directory(tmp_path / "model", **dropout(**{kind: 0.3}))
    batch = ragged_batch(8, (3, 2))
    _, plain = forward(twin, directory, batch)
    runs = [forward(twin, directory, batch, key=dropout_key(twin, k))[1] for k in (1, 1, 2)]
    for i in range(batch.n_passes):
        assert np.abs(runs[0][i] - plain[i]).max() > 1e-2
        np.testing.assert_array_equal(runs[0][i], runs[1][i])
        assert np.abs(runs[0][i] - runs[2][i]).max() > 1e-2


def test_embedding_dropout_reaches_the_thoughts(twin, tmp_path):
    # With every embedding dropped all columns look alike, so all states are the same; a thought
    # that was spared would make the state at its column differ.
    directory = model_directory(tmp_path / "model", **dropout(embd_pdrop=1 - 1e-7))
    _, thoughts = forward(twin, directory, ragged_batch(9, (3,)), key=dropout_key(twin, 1))
    for later in thoughts[1:]:
        np.testing.assert_allclose(later, thoughts[0], atol=1e-4)


def test_each_pass_drops_elements_of_its_own(twin, tmp_path, monkeypatch):
    directory = model_directory(tmp_path / "model", **dropout(embd_pdrop=0.5))
    model, module, _ = twin.weights.load_model(directory)
    dropped, original = [], module.dropout

    def spy(x, rate, key):
        out = original(x, rate, key)
        if rate:
            dropped.append(to_numpy(out)[:, -1] == 0)
        return out

    monkeypatch.setattr(module, "dropout", spy)
    batch = ragged_batch(10, (3,))
    inputs = twin.latent.Inputs.of(batch)
    twin.latent.latent_forward(model, inputs, batch.first_latent, 3, dropout_key(twin, 1))
    masks = {mask.tobytes() for mask in dropped}
    assert len(dropped) == len(masks) == 4


@pytest.mark.compiled
def test_dropout_differs_between_compiled_steps_and_not_for_one_key(twin, tmp_path):
    directory = model_directory(tmp_path / "model", **dropout(resid_pdrop=0.2))
    model, _, _ = twin.weights.load_model(directory)
    trainer = twin.train.Trainer(model, weight_decay=0.0)
    batch = ragged_batch(11)
    losses = [trainer.step([batch], 0.0, key).loss for key in [(0, 1), (0, 2), (0, 1)]]
    # Not to the bit within one process: see test_weights.py.
    same = pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == same and losses[1] != same
    assert trainer.loss(batch).loss_sum / batch.n_targets != same


def test_two_micro_batches_of_one_update_drop_differently(twin, tmp_path):
    directory = model_directory(tmp_path / "model", **dropout(resid_pdrop=0.2))
    batch = ragged_batch(12)
    once, _ = gradients(twin, directory, [batch], tmp_path)
    twice, _ = gradients(twin, directory, [batch, batch], tmp_path)
    assert twice.loss_sum != 2 * once.loss_sum


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_gradients(twin, tmp_path, rate):
    directory = model_directory(
        tmp_path / "model", embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate
    )
    batch = ragged_batch(13)
    kept, grads = gradients(twin, directory, [batch], tmp_path)
    recomputed, same = gradients(twin, directory, [batch], tmp_path, checkpointing=True)
    assert recomputed.loss == pytest.approx(kept.loss, rel=LOSS)
    assert_same_gradients(same, grads, GRADIENTS)


# ---- number formats


def test_bf16_computes_in_bfloat16_with_float32_weights_and_gradients(twin, tmp_path, monkeypatch):
    batch, seen = ragged_batch(14), []
    cross_entropy = twin.train.masked_cross_entropy
    monkeypatch.setattr(
        twin.train,
        "masked_cross_entropy",
        lambda logits, *rest: seen.append(str(logits.dtype)) or cross_entropy(logits, *rest),
    )
    exact, reference = gradients(twin, MODEL, [batch], tmp_path)
    rough, grads = gradients(twin, MODEL, [batch], tmp_path, bf16=True)
    assert [name.rpartition(".")[2] for name in seen] == ["float32", "bfloat16"]
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)
    for name, g in grads.items():
        assert g.dtype == np.float32
        if "c_attn.bias" not in name:  # its key part has no gradient but rounding
            assert np.linalg.norm(g - reference[name]) < 0.1 * np.linalg.norm(reference[name]), name


@pytest.mark.compiled
def test_bf16_updates_float32_weights(twin, tmp_path):
    model, module, _ = twin.weights.load_model(MODEL)
    trainer = twin.train.Trainer(model, weight_decay=0.0, bf16=True)
    before = twin.weights.to_numpy(twin.weights.hf_weights(model, module))
    # Far below bfloat16's resolution: weights kept in bfloat16 would not move.
    trainer.step([ragged_batch(15)], 1e-6, (0,))
    hf = twin.weights.hf_weights(model, module)
    save_weights(hf, tmp_path, twin.weights.write_tensors)
    after = load_file(tmp_path / "model.safetensors")
    for name, w in after.items():
        assert w.dtype == np.float32
        moved = np.abs(w - before[name])
        assert 0 < moved.max() < 2e-6, name
        if w.ndim == 2 and "wpe" not in name:
            assert (moved > 0).mean() > 0.5, name
