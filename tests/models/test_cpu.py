"""MLX's CPU functions: as exact as the ones they replace, with and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from golden_models import ragged_batch, run_model

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif("mlx" not in CHOSEN, reason="TWINS does not name mlx"),
]

EXP = 1e-7  # relative; 8.2e-8
TANH = 5e-7  # 3.6e-7
SOFTMAX = 5e-6  # of probabilities and their gradients; 1.7e-6
GRADIENTS = 2e-5  # of the largest entry of a tensor's gradient
LOG_SUM = 1e-6  # relative; 6e-8


@pytest.fixture
def cpu() -> Any:
    return load_twin("mlx").cpu


@pytest.fixture
def mx(cpu: Any) -> Any:
    import mlx.core  # behind the BLAS that the twin loads

    if mlx.core.default_device() != mlx.core.cpu:
        pytest.skip("these functions stand in for MLX's on the CPU alone")
    return mlx.core


def exact_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def scores() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(70, 300)) * 10
    x[:30, 150:] -= 1e9  # keys that must not be seen
    return x.astype(np.float32)


def test_exponentials_are_exact_to_the_last_bits_and_end_in_zero(cpu, mx):
    x = np.linspace(-120, 0, 1_000_001, dtype=np.float32)
    y = np.array(cpu.exp_shifted(mx.array(x), mx.zeros(1)))
    seen = x > -86.98
    assert np.abs(y[seen] / np.exp(x[seen].astype(np.float64)) - 1).max() < EXP
    assert (y[x <= -87] == 0).all()


def test_tanh_is_exact_to_the_last_bits(cpu, mx):
    x = np.linspace(-12, 12, 1_000_001, dtype=np.float32)
    assert np.abs(np.array(cpu.tanh(mx.array(x))) - np.tanh(x.astype(np.float64))).max() < TANH


def test_softmax_and_its_gradient_are_exact_and_unseen_keys_weigh_nothing(cpu, mx):
    x = scores()
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    (p,), (dx,) = mx.vjp(cpu.softmax, [mx.array(x)], [mx.array(g)])
    expected = exact_softmax(x)
    assert np.abs(np.array(p) - expected).max() < SOFTMAX
    slope = expected * (g - (expected * g).sum(axis=-1, keepdims=True))
    assert np.abs(np.array(dx) - slope).max() < SOFTMAX
    assert (np.array(p)[:30, 150:] == 0).all() and (np.array(dx)[:30, 150:] == 0).all()


def test_logsumexp_and_its_gradient_are_exact(cpu, mx):
    x = scores()
    (y,), (dx,) = mx.vjp(cpu.logsumexp, [mx.array(x)], [mx.full((70,), 2.0)])
    wide = x.astype(np.float64)
    top = wide.max(axis=-1)
    expected = np.log(np.exp(wide - top[:, None]).sum(axis=-1)) + top
    assert np.abs(np.array(y) / expected - 1).max() < LOG_SUM
    assert np.abs(np.array(dx) - 2 * exact_softmax(x)).max() < 2 * SOFTMAX


def test_a_model_computes_the_same_with_them_and_with_mlx_own(monkeypatch, cpu):
    mlx = load_twin("mlx")
    batch = ragged_batch(0)
    outputs = []
    for small in (0, 1 << 40):
        monkeypatch.setattr(cpu, "SMALL", small)
        outputs.append(run_model(mlx, "gpt2-tiny", batch))
    ours, own = outputs
    assert ours.loss == pytest.approx(own.loss, rel=1e-5)
    for name, g in own.grads.items():
        assert np.abs(ours.grads[name] - g).max() <= GRADIENTS * np.abs(g).max() + 1e-7, name


@pytest.mark.skipif(sys.platform != "linux", reason="only there does MLX call a compiler")
def test_a_machine_without_a_compiler_computes_the_same(tmp_path):
    program = """
from mlx_coconut.models import cpu
import mlx.core as mx
x = mx.linspace(-5, 5, 20000).reshape(200, 100)
print(cpu.gelu_new(x).sum().item(), cpu.softmax(x)[:, 99].sum().item())
print(cpu.logsumexp(x).sum().item())
"""

    def run(path: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PATH": path},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [float(number) for number in done.stdout.split()]

    assert run(str(tmp_path)) == pytest.approx(run(os.environ["PATH"]), rel=1e-5)
