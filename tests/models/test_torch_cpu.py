"""What the torch twin does differently on a CPU changes no result."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from golden_models import MODELS, ragged_batch
from tiny import dropout, model_directory

pytestmark = pytest.mark.skipif("cuda" not in CHOSEN, reason="TWINS does not name cuda")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 100, 16), (512, 1, 16), (300, 16)])
def test_a_product_by_convolution_equals_the_plain_one(monkeypatch, shape, bias):
    import torch

    cpu = load_twin("cuda").cpu
    generator = torch.Generator().manual_seed(0)
    layer = cpu.Linear(16, 24, bias=bias)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    cotangent = torch.randn((*shape[:-1], 24), generator=generator)
    results = []
    for mkl_is_slow in (True, False):
        monkeypatch.setattr(cpu, "MKL_IS_SLOW", mkl_is_slow)
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
        assert y.is_contiguous()
        results.append([y, *grads])
    for by_convolution, plain in zip(*results, strict=True):
        # 1e-5 of sums over up to 512 products of standard normal numbers.
        torch.testing.assert_close(by_convolution, plain, atol=1e-3, rtol=1e-5)


def test_bfloat16_stays_near_float32_and_leaves_weights_and_gradients_in_float32():
    import torch

    twin = load_twin("cuda")
    batch = ragged_batch(0)
    norms = []
    for bf16 in (False, True):
        model, _, _ = twin.weights.load_model(MODELS / "gpt2-tiny")
        trainer = twin.train.Trainer(model, weight_decay=0.0, bf16=bf16)
        stats = trainer.step([batch], 0.0, (0,))
        norms.append((stats.loss, stats.grad_norm))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    np.testing.assert_allclose(norms[1], norms[0], rtol=0.02)  # 0.003
    assert norms[1] != norms[0]


def test_a_model_without_its_weights_cannot_run():
    twin = load_twin("cuda")
    config = {
        "model_type": "gpt2",
        "vocab_size": 8,
        "n_positions": 8,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 1,
    }
    model, _ = twin.models.build(config, "config.json")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("latents", [(0, 0, 0), (2,)])
def test_the_causal_shortcut_changes_no_state(tmp_path, latents, rate):
    twin = load_twin("cuda")
    rates = dropout(embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    model, _, _ = twin.weights.load_model(model_directory(tmp_path / "model", **rates))
    batch = ragged_batch(0, latents)
    inputs = twin.latent.Inputs.of(batch)
    assert not inputs.pads_left
    hidden = [
        twin.latent.latent_forward(
            model, replace(inputs, pads_left=pads_left), batch.first_latent, batch.n_passes, (3,)
        ).hidden.detach()
        for pads_left in (False, True)
    ]
    np.testing.assert_allclose(hidden[0][batch.mask], hidden[1][batch.mask], atol=1e-5)


@pytest.mark.slow  # starts a process
def test_what_only_a_sharded_run_needs_is_not_imported():
    text = "import sys, cuda_coconut.backend; print('torch.distributed.fsdp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
