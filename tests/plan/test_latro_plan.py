"""What `--check` says of a LaTRO run: rollouts, tokens, memory, and what to watch."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from conftest import load_twin
from test_latro_runner import REPOSITORY, config

from coconut.plan import latro_plan
from coconut.plan.latro_plan import print_latro_plan
from coconut.plan.memory import evaluation_bytes, shape_of, training_bytes


def said(made, capsys, twin: str = "mlx_coconut") -> list[str]:
    capsys.readouterr()
    print_latro_plan(made, twin)
    return capsys.readouterr().out.splitlines()


def test_rollouts_tokens_and_what_the_released_code_would_do_are_said(tmp_path, capsys):
    made = config(tmp_path, total_updates=None, num_train_epochs=6, num_iterations=3)
    (line,) = [line for line in said(made, capsys) if line.startswith("in all")]
    # 3,800 prompts 6 times, 4 rationales of at most 5 tokens each; released: 3,800 * 6 rollouts.
    assert line.startswith("in all 91,200 rollouts, up to 456,000 tokens drawn")
    assert "trained on, 3 times" in line and "4 times the 22,800 that the released code" in line
    (line,) = [line for line in said(config(tmp_path), capsys) if line.startswith("in all")]
    assert line == "in all 24 rollouts, up to 120 tokens drawn, then scored, then trained on"


@pytest.mark.parametrize("sft_penalty", [0, 1])
def test_the_plan_warns_of_an_answer_term_that_lets_the_rationale_be_passed_over(
    tmp_path, capsys, sft_penalty
):
    lines = said(config(tmp_path, sft_penalty=sft_penalty), capsys)
    assert any("from the questions alone" in line for line in lines) == bool(sft_penalty)


@pytest.mark.parametrize("kl_coef", [0, 0.1])
def test_memory_is_split_into_what_takes_it(tmp_path, capsys, kl_coef):
    model = json.loads((REPOSITORY / "args/models/tiny_latro.json").read_text())
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(model | {"n_embd": 1024, "n_layer": 8, "n_positions": 512}))
    made = config(
        tmp_path, model_config_path=str(wide), response_length=400, kl_coef=kl_coef, bf16=True
    )
    lines = said(made, capsys)
    (split,) = [line for line in lines if line.startswith("estimated memory in GB")]
    found = {n: float(gb) for n, gb in re.findall(r"(\w+)(?: of \d+ rows)? (\d+\.\d+)", split)}
    shape = shape_of(json.loads(wide.read_text()), 260, "wide")
    gb = shape.n_params / 1e9
    assert found["weights"] == pytest.approx(6 * gb, abs=0.01)  # with their bfloat16 copy
    assert found["gradient"] == pytest.approx(4 * gb, abs=0.01)
    assert found["moments"] == pytest.approx(8 * gb, abs=0.01)
    assert found["reference"] == pytest.approx(4 * gb * (kl_coef > 0), abs=0.01)
    (peak,) = [line for line in lines if line.startswith("estimated peak memory")]
    update, draw = (float(x) for x in re.findall(r"(\d+\.\d+) GB", peak))
    rows, row = made.batch_size_training, 411
    whole = training_bytes(shape, rows, row, latro_plan.SCORED, made) / 1e9
    assert update == pytest.approx(whole + found["reference"], abs=0.03)
    bare = training_bytes(replace(shape, n_params=0), rows, row, latro_plan.SCORED, made)
    assert found["activations"] == pytest.approx(bare / 1e9, abs=0.01) and bare > 1e7
    cache = evaluation_bytes(shape, made.rollout_batch_size, 11, 400, True) / 1e9 - 6 * gb
    assert found["cache"] == pytest.approx(cache, abs=0.02)
    total = found["weights"] + found["moments"] + found["reference"] + found["cache"]
    assert draw == pytest.approx(total, abs=0.03)


def test_logits_exist_for_as_many_positions_as_the_plan_reckons():
    assert {load_twin(name).latro.CHUNK for name in ("mlx", "cuda")} == {latro_plan.SCORED}
