"""The measurement on a GPU, at tiny shapes on whatever machine this is."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CHOSEN

if "cuda" not in CHOSEN:
    pytest.skip("of the torch twin", allow_module_level=True)
from bench import gpu, twin


def in_this_process(name: str, *work: Any) -> dict[str, Any]:
    from bench import reference  # imports transformers

    run = reference.run if name == gpu.PLAIN else lambda *w: twin.run(name, *w)
    return {"versions": ""} | run(*work)


@pytest.mark.slow
def test_ours_and_transformers_train_and_write_the_same(tmp_path, capsys):
    pytest.importorskip("transformers")
    rows = gpu.measure(tmp_path, gpu.SMALL, 1, in_this_process, ["cuda_coconut", gpu.PLAIN])
    assert gpu.is_valid(rows)
    kinds = {(row["task"], row["batch"], row["dtype"]) for row in rows}
    assert len(kinds) == 6 and len(rows) == 12
    for row in rows:
        assert row["samples_per_second"] > 0 and row["device_peak_bytes"] > 0
        if row["task"] == "train":
            assert len(row["losses"]) == 2 and row["losses"][0] != row["losses"][1]
        elif row["dtype"] == "float32":
            assert row["same_rows"] == 1
    assert "train, batch 4, 6 latents, an update, float32" in capsys.readouterr().out


def test_another_result_or_one_of_ours_missing_voids_the_figures(tmp_path, capsys):
    def contend(name: str, task: str, workload: Any, *_: Any) -> dict[str, Any]:
        if name == "fails":
            return {"error": "OutOfMemoryError: CUDA out of memory"}
        losses = [2.0 if name == "other" else 1.0]
        common = {"seconds": [1.0], "device": "gpu", "device_peak_bytes": 1, "losses": losses}
        return common | {"ids": [[1]] * len(workload.rows)}

    def valid(*names: str) -> bool:
        where = tmp_path / "-".join(names)
        return gpu.is_valid(gpu.measure(where, gpu.SMALL, 1, contend, list(names)))

    assert valid("ours", gpu.PLAIN)
    assert not valid("ours", "other", gpu.PLAIN)
    assert not valid("ours", "fails", gpu.PLAIN)
    assert "fails          did not run: OutOfMemoryError: CUDA out of memory" in (
        capsys.readouterr().out
    )
