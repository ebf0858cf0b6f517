"""The device a run computes on, what it may round there, and how much it may keep."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import load_twin
from tiny import run_config, start

from coconut.errors import UserError
from coconut.world import wanted_device


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
