"""`mac-check`: it measures, says what is wrong without stopping, and makes a table of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CHOSEN, load_twin

from coconut.commands import mac_check

pytestmark = pytest.mark.skipif("mlx" not in CHOSEN, reason="TWINS does not name mlx")
# All of them: make mac-check, which .ci/run runs too.
QUICK = ["float32_products", "layer_norm", "golden", "demo", "decoding", "page"]


def check(tmp_path: Path, *names: str) -> tuple[int, dict]:
    out = tmp_path / "seen.json"
    with pytest.raises(SystemExit) as ended:
        mac_check.main(
            "mlx_coconut",
            load_twin("mlx").run.make_backend,
            ["--out", str(out), "--only", *names],
        )
    return ended.value.code, json.loads(out.read_text())


def test_this_machine_computes_as_it_should_from_any_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, seen = check(tmp_path, *QUICK)
    assert status == 0 and list(seen["checks"]) == QUICK
    assert seen["checks"]["golden"]["gaps"].keys() >= {"gpt2-tiny logits", "qwen2-tiny gradients"}
    assert capsys.readouterr().out.count("ok ") == len(QUICK)


def test_what_is_wrong_is_said_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    probes = load_twin("mlx").probes
    monkeypatch.setattr(probes, "product_error", lambda: 1e-3)  # as TF32 has it
    monkeypatch.setattr(probes, "wrong_bias_gradients", lambda: 1 / 0)
    status, seen = check(tmp_path, *QUICK[:3])
    out = capsys.readouterr().out
    assert status == 1 and "not as it should be: float32_products, layer_norm" in out
    assert "ZeroDivisionError" in seen["checks"]["layer_norm"]["error"]
    assert seen["checks"]["golden"]["ok"]


def test_rounded_products_and_gradients_are_noticed(monkeypatch):
    twin = load_twin("mlx")
    probes, mx = twin.probes, twin.probes.mx
    real = mx.array

    def rounded(a):
        a = real(a)
        return a.astype(mx.bfloat16).astype(mx.float32) if a.dtype == mx.float32 else a

    monkeypatch.setattr(probes.mx, "array", rounded)
    assert probes.product_error(64) > 1e-4
    monkeypatch.setattr(probes.mx, "array", lambda a: real(a) + 0.01)
    assert probes.wrong_bias_gradients(3) == 3


def test_files_of_several_machines_become_a_table(tmp_path, capsys):
    rows = []
    for chip in ("M1", "M4 Max"):
        rows.append(str(tmp_path / f"{chip}.json"))
        content = {
            "machine": {"device_name": chip, "system": "macOS", "mlx": "0.32.4"},
            "checks": {"memory": {"ok": False, "peak_memory_bytes": 3_200_000_000}},
        }
        Path(rows[-1]).write_text(json.dumps(content))
    mac_check.main("mlx_coconut", None, ["--table", *rows])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| chip | system | MLX | tokens/s")
    assert lines[3].startswith("| M4 Max | macOS | 0.32.4 |") and "| 3.2 |" in lines[3]
    assert lines[3].endswith("| memory |")


def test_the_torch_twin_points_to_the_other(capsys):
    with pytest.raises(SystemExit) as ended:
        mac_check.main("cuda_coconut", None, [])
    assert ended.value.code == 2 and "use mlx-coconut mac-check" in capsys.readouterr().err
