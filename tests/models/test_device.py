"""The device a run computes on, what it may round there, and how much it may keep."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import load_twin
from tiny import run_config, start

from coconut.errors import UserError
from coconut.world import wanted_device

CPU_STREAM = "mx.stream(mx.cpu)"


@pytest.fixture
def metal(monkeypatch):
    """MLX as it is on a Mac, as far as `start_device` asks: what it was told is kept."""
    backend = load_twin("mlx").backend
    told: dict[str, Any] = {}
    mx = SimpleNamespace(
        cpu="cpu",
        gpu="gpu",
        is_available=lambda device: True,
        default_device=lambda: told.get("device", "gpu"),
        set_default_device=lambda device: told.update(device=device),
        device_info=lambda: {"max_recommended_working_set_size": 12_000},
        set_cache_limit=lambda n: told.update(cache=n),
        set_wired_limit=lambda n: told.update(wired=n),
    )
    monkeypatch.setattr(backend, "mx", mx)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    return backend, told


def test_on_metal_products_are_whole_and_what_is_kept_is_bounded(metal):
    backend, told = metal
    assert backend.start_device(None, tf32=False) is True
    assert os.environ["MLX_ENABLE_TF32"] == "0"
    assert told == {"cache": 3_000, "wired": 12_000}


@pytest.mark.parametrize(
    "said, key, used", [(None, True, "1"), ("1", False, "1"), ("0", True, "0")]
)
def test_what_the_user_says_of_tf32_holds(metal, monkeypatch, said, key, used):
    if said is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", said)
    metal[0].start_device(None, tf32=key)
    assert os.environ["MLX_ENABLE_TF32"] == used


def test_the_cpu_of_a_mac_can_be_asked_for(metal):
    backend, told = metal
    assert backend.start_device("cpu", tf32=True) is False and told == {"device": "cpu"}


def test_torch_is_told_how_to_round(monkeypatch):
    torch = pytest.importorskip("torch")
    backend = load_twin("cuda").backend
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tf32, name in ((True, "high"), (False, "highest")):
        assert backend.start_device(None, tf32) is True
        assert torch.get_float32_matmul_precision() == name
    assert backend.start_device("cpu", False) is False


def test_a_gpu_that_is_not_there_is_refused(twin, monkeypatch):
    if twin.__name__ == "mlx_coconut":
        import mlx.core as mx

        monkeypatch.setattr(mx, "is_available", lambda device: False)
    else:
        monkeypatch.setattr(twin.backend.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="none here; use device: cpu"):
        twin.backend.start_device("gpu", tf32=False)


def test_the_key_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("COCONUT_DEVICE", "gpu")
    assert wanted_device(None) == "gpu" and wanted_device("cpu") == "cpu"
    monkeypatch.setenv("COCONUT_DEVICE", "tpu")
    with pytest.raises(UserError, match="expected cpu or gpu, got 'tpu'"):
        wanted_device(None)


def test_a_run_says_and_records_that_products_are_rounded(tmp_path, monkeypatch, capsys):
    twin = load_twin("mlx")
    for tf32, dtype in ((True, "float32 with TF32 products"), (False, "float32")):
        # As if on a GPU; the arrays are on the CPU all the same.
        monkeypatch.setenv("MLX_ENABLE_TF32", str(int(tf32)))
        monkeypatch.setattr(twin.backend, "start_device", lambda *_: True)
        monkeypatch.setattr(twin.backend.mx, "device_info", lambda: {"device_name": "M9"})
        config = run_config(tmp_path, name=f"tf32_{tf32}", num_epochs=1, tf32=tf32)
        start(twin, config).train()
        assert f" M9 {dtype} | run" in capsys.readouterr().out
        log = (config.run_dir / "log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["config"]["tf32"] is tf32


def test_no_float64_array_of_mlx_meets_another_stream_than_the_cpus():
    """A GPU has no float64: outside of `with mx.stream(mx.cpu)` it may be compared with only."""
    folder = Path(load_twin("mlx").backend.__file__).parent
    outside = []
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        allowed: set[ast.AST] = set()
        for node in ast.walk(tree):
            is_cpu = (
                isinstance(node, ast.With) and ast.unparse(node.items[0]) == "mx.stream(mx.cpu)"
            )
            if is_cpu or isinstance(node, ast.Compare):
                allowed |= set(ast.walk(node))
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "float64"]
        outside += [
            f"{path.name}:{n.lineno}"
            for n in found
            if n not in allowed and ast.unparse(n.value) == "mx"
        ]
    assert outside == []


def test_matrices_that_are_inverted_are_multiplied_on_the_cpu(monkeypatch):
    import mlx.core as mx

    arrays, streams = load_twin("mlx").arrays, []
    stream = mx.stream

    def noted(device):
        streams.append(device)
        return stream(device)

    monkeypatch.setattr(arrays.mx, "stream", noted)
    rows = mx.random.normal((5, 3))
    gram, inverse = arrays.gram(rows), arrays.inverse_of(rows[None], 0.1)
    assert streams == [mx.cpu, mx.cpu]
    whole = np.array(rows, np.float64)
    loaded = whole.T @ whole + 0.1 * np.trace(whole.T @ whole) / 3 * np.eye(3)
    assert np.abs(gram - whole.T @ whole).max() < 1e-5
    assert np.abs(np.array(inverse)[0] @ loaded - np.eye(3)).max() < 1e-5


def test_bytes_are_told_apart_and_a_full_cache_is_given_back(twin, tmp_path, monkeypatch):
    runner = start(twin, run_config(tmp_path))
    runner.console.close()
    backend, found = runner.backend, runner.backend.memory()
    assert found["peak_memory_bytes"] > 0
    if twin.__name__ == "cuda_coconut":
        return
    mx, cleared = twin.backend.mx, []
    assert 0 < found["active_memory_bytes"] <= found["peak_memory_bytes"]
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    for cached, on_gpu, n in ((10**12, False, 0), (0, True, 0), (10**12, True, 1)):
        monkeypatch.setattr(mx, "get_cache_memory", lambda cached=cached: cached)
        backend.on_gpu = on_gpu
        assert backend.memory()["cached_memory_bytes"] == cached and len(cleared) == n
