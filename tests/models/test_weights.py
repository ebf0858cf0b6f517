"""Checkpoint directories in and out: other programs, shards, strictness, layouts, moments."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from golden_models import TOKENS, as_row, mlx_array, ragged_batch, to_numpy, torch_array
from safetensors.numpy import load_file, save_file
from tiny import MODEL, assert_same_updates, model_directory, run_config, start

from coconut.batches.batch import collate
from coconut.checkpoints import architectures, model_files
from coconut.checkpoints.initial import initial_weights
from coconut.checkpoints.model_files import save_weights
from coconut.checkpoints.source import Source
from coconut.errors import UserError

LOGITS = 5e-5  # 2.3e-6 seen
IDS = [5, 17, 99, 150, TOKENS["latent"], 3]


def hf_file() -> dict[str, np.ndarray]:
    """The golden weights under the hub's names, without prefix."""
    found = load_file(MODEL / "model.safetensors")
    return {name.removeprefix("transformer."): w for name, w in found.items()}


def write(directory, weights: dict[str, np.ndarray]):
    """A model directory with these weights."""
    model_directory(directory)
    (directory / "model.safetensors").unlink()
    save_file({n: np.ascontiguousarray(w) for n, w in weights.items()}, _file(directory))
    return directory


def _file(directory):
    return directory / "model.safetensors"


def saved(twin, model, module, directory):
    """What `save_weights` writes of a model, as a directory."""
    directory.mkdir(exist_ok=True)
    shutil.copy(MODEL / "config.json", directory)
    hf = twin.weights.hf_weights(model, module)
    save_weights(hf, directory, twin.weights.write_tensors)
    return directory


def weights_of(twin, directory) -> dict[str, np.ndarray]:
    model, module, _ = twin.weights.load_model(directory)
    return twin.weights.to_numpy(twin.weights.hf_weights(model, module))


def assert_golden(weights: dict[str, np.ndarray]) -> None:
    expected = hf_file()
    assert weights.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(weights[name], w)


# ---- other programs


@pytest.fixture(scope="module", params=CHOSEN)
def trained(request, tmp_path_factory):
    """(checkpoint directory of a short Coconut run, its logits for IDS)."""
    twin = load_twin(request.param)
    config = run_config(tmp_path_factory.mktemp("run"))
    runner = start(twin, config)
    runner._evaluation_due = lambda epoch: False
    runner.train()
    model, batch = runner.backend.model, collate([as_row(0, IDS, None)], 0)
    out = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), len(IDS), 0)
    return config.run_dir / "epoch_02", to_numpy(model.head(out.hidden))[0]


@pytest.mark.slow
def test_transformers_opens_what_we_save(trained):
    directory, expected = trained
    import torch
    import transformers

    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        directory, output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}  # tied
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(logits - expected).max() < LOGITS
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
def test_mlx_lm_opens_what_we_save(trained):
    directory, expected = trained
    import mlx.core as mx
    import mlx_lm.utils

    model, tokenizer = mlx_lm.utils.load(str(directory))
    logits = np.array(model(mx.array([IDS])))[0]
    assert np.abs(logits - expected).max() < LOGITS
    assert len(tokenizer.encode("Every impus is a lempus. ")) > 0


@pytest.mark.slow
def test_what_transformers_saves_is_opened(twin, tmp_path):
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(MODEL)
    model.save_pretrained(tmp_path)
    assert_golden(weights_of(twin, tmp_path))


# ---- shards


def test_shards_come_back_as_they_were_and_name_every_tensor(twin, tmp_path, monkeypatch):
    model, module, _ = twin.weights.load_model(MODEL)
    monkeypatch.setattr(model_files, "SHARD_BYTES", 100_000)
    directory = saved(twin, model, module, tmp_path / "shards")
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    n = len(files)
    assert n > 2
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert_golden(weights_of(twin, directory))
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in hf_file().values())
    for name, file in index["weight_map"].items():
        assert name in load_file(directory / file)
    for file in files:
        largest = max(w.nbytes for w in load_file(directory / file).values())
        assert (directory / file).stat().st_size < max(100_000, largest) + 10_000


# ---- strictness


def test_missing_extra_and_misshaped_tensors_are_all_named(twin, tmp_path):
    weights = hf_file()
    del weights["h.1.ln_2.bias"]
    weights["h.3.ln_2.bias"] = np.zeros(64, np.float32)
    weights["wpe.weight"] = weights["wpe.weight"][:100]
    with pytest.raises(UserError) as error:
        twin.weights.load_model(write(tmp_path / "bad", weights))
    text = str(error.value)
    assert str(tmp_path / "bad") in text
    assert "h.1.ln_2.bias: missing" in text
    assert "h.3.ln_2.bias: not a tensor of this model" in text
    assert "wpe.weight: shape (100, 64), expected (256, 64)" in text


def test_a_directory_without_weights_is_refused(twin, tmp_path):
    directory = model_directory(tmp_path / "bare")
    _file(directory).rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights: expected model\.safetensors"):
        twin.weights.load_model(directory)


# ---- layouts


def test_every_layout_of_gpt2_gives_the_same_weights(twin, tmp_path):
    plain = hf_file()
    prefixed = {f"transformer.{name}": w for name, w in plain.items()}
    head = {"lm_head.weight": plain["wte.weight"]}
    buffers = {}
    for i in range(3):
        buffers[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 256, 256), np.float32))
        buffers[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    layouts = {"plain": plain, "prefix": prefixed, "head": prefixed | head, "hub": plain | buffers}
    for name, weights in layouts.items():
        assert_golden(weights_of(twin, write(tmp_path / name, weights)))


def test_half_precision_files_become_float32(twin, tmp_path):
    half = {name: w.astype(np.float16) for name, w in hf_file().items()}
    model, module, _ = twin.weights.load_model(write(tmp_path / "half", half))
    again = load_file(_file(saved(twin, model, module, tmp_path / "out")))
    for name, w in half.items():
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(again[name], w.astype(np.float32))


def test_sanitize_twice_equals_once_and_turns_the_square_projection(twin):
    _, module, _ = twin.weights.load_model(MODEL)
    hf, array = hf_file(), mlx_array if twin.__name__ == "mlx_coconut" else torch_array
    ours = module.sanitize({name: array(w) for name, w in hf.items()})
    once, twice = (twin.weights.to_numpy(w) for w in (ours, module.sanitize(ours)))
    assert once.keys() == twice.keys() == hf.keys()
    for name, w in once.items():
        np.testing.assert_array_equal(twice[name], w)
        is_linear = name.endswith("weight") and w.ndim == 2 and name.startswith("h.")
        np.testing.assert_array_equal(w, hf[name].T if is_linear else hf[name])
    square = "h.0.attn.c_proj.weight"
    assert not np.array_equal(once[square], hf[square])


def test_saved_weights_are_the_hubs_layout_bit_for_bit(twin, tmp_path):
    model, module, _ = twin.weights.load_model(MODEL)
    assert_golden(load_file(_file(saved(twin, model, module, tmp_path / "out"))))


def test_a_round_trip_keeps_every_bit(twin, tmp_path):
    model, module, _ = twin.weights.load_model(MODEL)
    directory = saved(twin, model, module, tmp_path / "out")
    again, module, _ = twin.weights.load_model(directory)
    ours, theirs = (
        twin.weights.to_numpy(twin.weights.hf_weights(m, module)) for m in (model, again)
    )
    assert ours.keys() == theirs.keys()
    for name, w in ours.items():
        np.testing.assert_array_equal(theirs[name], w)
    batch = ragged_batch(1)
    losses = [twin.train.Trainer(m, weight_decay=0.0).loss(batch).loss_sum for m in (model, again)]
    # Not bitwise: within one process the last bit depends on where arrays lie in memory.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- moments


def trained_pair(twin, directory):
    """A model and its trainer after two updates."""
    model, module, _ = twin.weights.load_model(directory)
    trainer = twin.train.Trainer(model, weight_decay=0.01)
    for i in range(2):
        trainer.step([ragged_batch(i)], 1e-3, (0, i))
    return model, module, trainer


def without_key_bias(weights):
    """The key's bias has no gradient but rounding, which Adam turns into full steps."""
    return {name: w for name, w in weights.items() if not name.endswith("c_attn.bias")}


def test_moments_come_back_and_the_next_update_is_the_same(twin, tmp_path):
    model, module, trainer = trained_pair(twin, MODEL)
    directory = saved(twin, model, module, tmp_path / "out")
    twin.weights.save_moments(trainer.optimizer, module, directory)
    again, _, _ = twin.weights.load_model(directory)
    other = twin.train.Trainer(again, weight_decay=0.01)
    twin.weights.load_moments(other.optimizer, again, module, directory)
    (tmp_path / "again").mkdir()
    twin.weights.save_moments(other.optimizer, module, tmp_path / "again")
    first, second = (
        load_file(d / "optimizer.safetensors") for d in (directory, tmp_path / "again")
    )
    assert first["step"] == 2
    assert first.keys() == second.keys()
    for name, moment in first.items():
        np.testing.assert_array_equal(second[name], moment)
    for t in (trainer, other):
        t.step([ragged_batch(2)], 1e-3, (0, 2))
    ours, theirs = (
        twin.weights.to_numpy(twin.weights.hf_weights(m, module)) for m in (model, again)
    )
    # Not bitwise: within one process the last bit depends on where arrays lie in memory.
    # test_resume.py holds whole processes to the bit.
    assert_same_updates(without_key_bias(theirs), without_key_bias(ours), 1e-3)


def test_moments_have_the_hubs_names_and_layout(twin, tmp_path):
    _, module, trainer = trained_pair(twin, MODEL)
    twin.weights.save_moments(trainer.optimizer, module, tmp_path)
    found = load_file(tmp_path / "optimizer.safetensors")
    shapes = {f"{kind}.{name}": w.shape for kind in "mv" for name, w in hf_file().items()}
    assert {n: w.shape for n, w in found.items() if n != "step"} == shapes


def test_moments_that_do_not_fit_or_are_missing_are_refused(twin, tmp_path):
    model, module, trainer = trained_pair(twin, MODEL)
    with pytest.raises(UserError, match=r"optimizer\.safetensors.*missing"):
        twin.weights.load_moments(trainer.optimizer, model, module, tmp_path)
    twin.weights.save_moments(trainer.optimizer, module, tmp_path)
    path = tmp_path / "optimizer.safetensors"
    whole = load_file(path)
    for broken in (
        {n: w for n, w in whole.items() if n != "v.wpe.weight"},
        whole | {"m.wpe.weight": np.zeros((3, 64), np.float32)},
        {n: w for n, w in whole.items() if n != "step"},
        whole | {"m.h.0.attn.c_attn.weight": np.zeros(3, np.float32)},
        whole | {"step": np.array([1, 2])},
        whole | {"step": np.array([np.nan])},
        whole | {"m.wpe.weight": whole["m.wpe.weight"].astype(np.int8)},
    ):
        save_file(broken, path)
        with pytest.raises(UserError, match="do not fit the model"):
            twin.weights.load_moments(trainer.optimizer, model, module, tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"optimizer\.safetensors: truncated"):
        twin.weights.load_moments(trainer.optimizer, model, module, tmp_path)


@pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")
@pytest.mark.parametrize("writer", ["mlx", "cuda"])
def test_each_twin_goes_on_from_the_others_checkpoint(tmp_path, writer):
    ours, theirs = (load_twin(name) for name in (writer, {"mlx": "cuda", "cuda": "mlx"}[writer]))
    model, module, trainer = trained_pair(ours, MODEL)
    directory = saved(ours, model, module, tmp_path / "out")
    ours.weights.save_moments(trainer.optimizer, module, directory)
    again, other_module, _ = theirs.weights.load_model(directory)
    other = theirs.train.Trainer(again, weight_decay=0.01)
    theirs.weights.load_moments(other.optimizer, again, other_module, directory)
    for t in (trainer, other):
        t.step([ragged_batch(2)], 1e-3, (0, 2))
    left = ours.weights.to_numpy(ours.weights.hf_weights(model, module))
    right = theirs.weights.to_numpy(theirs.weights.hf_weights(again, other_module))
    assert_same_updates(without_key_bias(right), without_key_bias(left), 1e-3)


# ---- new rows of the embedding


def test_marker_rows_start_as_published_and_old_rows_stay(twin, tmp_path):
    config = run_config(tmp_path)
    model = json.loads((MODEL / "config.json").read_text())
    source = Source(model, MODEL, 203, range(200, 203), copy_from=7)
    backend = twin.backend.Backend(config, source)
    grown, old = backend.weights(), hf_file()
    assert grown["wte.weight"].shape == (203, 64)
    np.testing.assert_array_equal(grown["wte.weight"][:200], old["wte.weight"])
    for row in range(200, 203):
        np.testing.assert_array_equal(grown["wte.weight"][row], old["wte.weight"][7])
    for name in old.keys() - {"wte.weight"}:
        np.testing.assert_array_equal(grown[name], old[name])
    out = tmp_path / "out"
    out.mkdir()
    backend.save(out, with_optimizer=False)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 203
    again = twin.backend.Backend(config, Source(model | {"vocab_size": 203}, out, 203, range(0), 7))
    np.testing.assert_array_equal(again.weights()["wte.weight"], grown["wte.weight"])


def test_random_weights_of_a_seed_are_the_same_numbers_on_both_twins(twin, tmp_path):
    config = run_config(tmp_path, seed=3)
    runner = start(twin, config)
    runner.console.close()
    weights = runner.backend.weights()
    shapes = {name: w.shape for name, w in weights.items()}
    model = json.loads((MODEL / "config.json").read_text()) | {
        "n_layer": 2,
        "initializer_range": 0.125,
    }
    for name, w in initial_weights(shapes, model, 3).items():
        np.testing.assert_array_equal(weights[name], w)


def test_every_hand_written_architecture_is_described_once_for_both_twins(twin):
    assert twin.models.HAND_WRITTEN.keys() == architectures.HAND_WRITTEN.keys()
    for name, args in architectures.HAND_WRITTEN.items():
        assert twin.models.HAND_WRITTEN[name].ModelArgs is args
