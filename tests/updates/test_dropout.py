"""Dropout at a usual GPT-2's rates: off outside of training, its mean kept, drawn apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_models import MODELS, TOKENS, ragged_batch, to_numpy
from test_latro import random_rollouts
from tiny import (
    MODEL,
    REPOSITORY,
    dropout,
    dropout_key,
    model_directory,
    read_log,
    rows_of,
    run_config,
    start,
)

from coconut.batches.batch import collate
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding
from coconut.batches.rollouts import collate_rollouts
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig

RATE = 0.1
USUAL = dropout(embd_pdrop=RATE, attn_pdrop=RATE, resid_pdrop=RATE)
SAME = 1e-6  # relative; dropout at this rate changes a loss by 1e-2


def backend(twin, directory) -> Any:
    config = json.loads((directory / "config.json").read_text())
    size = config["vocab_size"]
    source = Source(config, directory, vocab_size=size, new_tokens=range(0), copy_from=None)
    return twin.run.make_backend(RunConfig(method="coconut"), source)


def computed(engine: Any) -> dict[str, Any]:
    """All that a back end computes without training."""
    batch = ragged_batch(8, (3, 2))
    questions = [Row(r.idx, r.ids[: r.first_latent + 4], None, r.first_latent, r.n_latents)
                 for r in rows_of(batch)]  # fmt: skip
    asked = collate(questions, TOKENS["eos"])
    rollouts = collate_rollouts(random_rollouts(3), TOKENS["latro_pad"])
    return {
        "loss": engine.eval_loss(batch).loss_sum,
        "answers": engine.generate(asked, Decoding(6, eos_id=-1)),
        "scores": engine.score(rollouts).logprobs,
    }


def test_nothing_but_training_drops(twin, tmp_path):
    usual = backend(twin, model_directory(tmp_path / "usual", **USUAL))
    expected = computed(backend(twin, MODEL))
    for _ in range(2):  # before training and behind it: no state of it stays
        ours = computed(usual)
        assert ours["loss"] == pytest.approx(expected["loss"], rel=SAME)
        assert ours["answers"] == expected["answers"]
        np.testing.assert_allclose(ours["scores"], expected["scores"], atol=1e-5)
        dropped = usual.train_step([ragged_batch(8, (3, 2))], 0.0, (0, 1)).loss_sum
        assert dropped != pytest.approx(expected["loss"], rel=1e-4)


def test_a_runs_validation_is_without_dropout(twin, tmp_path):
    losses = []
    for name, rates in (("usual", USUAL), ("none", dropout())):
        shape = json.loads((REPOSITORY / "args/models/tiny_gpt2.json").read_text()) | rates
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(shape))
        config = run_config(
            tmp_path, name=name, model_config_path=str(path), lr=0.0, num_epochs=1, swap_test=False
        )
        start(twin, config).train()
        losses.append([read_log(config, kind)[0]["loss"] for kind in ("train", "eval")])
    usual, none = losses
    assert usual[1] == pytest.approx(none[1], rel=SAME)
    assert usual[0] != pytest.approx(none[0], rel=1e-5)


def ones(twin, *shape: int) -> Any:
    if twin.__name__ == "mlx_coconut":
        import mlx.core as mx

        return mx.ones(shape)
    import torch

    return torch.ones(shape)


def test_what_stays_is_enlarged_so_that_the_mean_is_kept(twin):
    out = to_numpy(twin.base.dropout(ones(twin, 300, 400), RATE, dropout_key(twin, 3)))
    values, counts = np.unique(out, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / (1 - RATE)], rtol=1e-6)
    assert counts[0] / out.size == pytest.approx(RATE, abs=0.005)
    assert out.mean() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("sizes", [(64,), (40, 24)])
def test_attention_that_drops_keeps_its_mean(twin, sizes):
    # Equal scores and values of 1: each output is the sum of the weights that stay.
    q = ones(twin, 2, 4, 50, 8)
    keys = [ones(twin, 2, 4, n, 8) for n in sizes]
    out = to_numpy(twin.base.attend(q, keys, keys, None, 0.5, dropout_key(twin, 4)))
    assert out.mean() == pytest.approx(1, abs=0.02) and out.std() > 0.05
    plain = to_numpy(twin.base.attend(q, keys, keys, None, 0.5, None))
    np.testing.assert_allclose(plain, 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen2-tiny"])
def test_every_place_of_every_layer_and_pass_draws_by_a_key_of_its_own(twin, name, monkeypatch):
    model, module, _ = twin.weights.load_model(MODELS / name)
    keys, n_passes = [], 2

    def noting(name):
        original = getattr(module, name)

        def call(*args):
            keys.append(np.array(args[-1]).tobytes())
            return original(*args)

        return call

    for drawing in {"dropout", "attend"} & vars(module).keys():
        monkeypatch.setattr(module, drawing, noting(drawing))
    batch = ragged_batch(10, (n_passes,))
    inputs = twin.latent.Inputs.of(batch)
    key = dropout_key(twin, 1)
    twin.latent.latent_forward(model, inputs, batch.first_latent, n_passes, key)
    a_layer, once = (3, 1) if name == "gpt2-tiny" else (1, 0)
    assert len(keys) == (n_passes + 1) * (a_layer * len(model.layers) + once)
    assert len(set(keys)) == len(keys)
