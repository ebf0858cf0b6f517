"""One verdict on a model of others: computed as transformers computes it, or refused by name.

`cases/` holds small inputs with the logits that transformers computes for them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from golden_models import MODELS, as_row, run_model, to_numpy
from safetensors.numpy import load_file, save_file
from tiny import MODEL, assert_same_gradients, model_directory, random_gpt2, write_items

from coconut.batches.batch import collate
from coconut.batches.decoding import Decoding
from coconut.checkpoints import verdict
from coconut.checkpoints.adapters import trained_shapes
from coconut.checkpoints.architectures import TRIED
from coconut.checkpoints.checkpoint import describe
from coconut.checkpoints.model_args import ACTIVATIONS
from coconut.checkpoints.source import Source
from coconut.checkpoints.verdict import judged
from coconut.commands import verbs
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.convert.read import read
from coconut.errors import UserError
from coconut.files import read_json, write_json
from convert import torch_to_mlx

CASES = Path(__file__).parent / "cases"
LOGITS = 1e-4  # the files hold four decimals; 5e-5 seen
GRADIENTS = 5e-5  # of a tensor's norm; 3e-6 seen
both = pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")


def last_logits(twin: Any, directory: Path, ids: list[int]) -> np.ndarray:
    model, _, _ = twin.weights.load_model(directory)
    batch = collate([as_row(0, ids, None)], 0)
    out = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), len(ids), 0)
    return to_numpy(model.head(out.hidden))[0, -1]


def assert_expected(twin: Any, directory: Path, case: str) -> None:
    expected = read_json(CASES / case / "expected.json")
    ours = last_logits(twin, directory, expected["ids"])
    assert np.abs(ours - np.array(expected["last_logits"])).max() < LOGITS


def converted(source: Path, target: Path, *options: str) -> Path:
    torch_to_mlx.main([str(source), str(target), "--tokenizer", "none", *options])
    return target


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as refused:
        call(*args)
    return str(refused.value)


# ---- the cases


@pytest.mark.parametrize(
    "case", ["01_gpt2_inverse_layer", "03_gpt2_relu", "05_gpt2_untied", "08_float64"]
)
def test_others_gpt2_gives_the_logits_of_transformers(twin, tmp_path, capsys, case):
    assert_expected(twin, CASES / case, case)
    assert_expected(twin, converted(CASES / case, tmp_path / "out"), case)
    assert ("float64 read as float32" in capsys.readouterr().out) == (case == "08_float64")


def test_two_sets_of_weights_are_refused_until_one_is_gone(twin, tmp_path):
    path = Path(shutil.copytree(CASES / "07_stale_index", tmp_path / "model"))
    index = path / "model.safetensors.index.json"
    said = f"{path}: two sets of weights, which differ in transformer.h.0.attn.c_attn.weight"
    for call in (twin.weights.load_model, describe, read):
        assert refusal(call, path).startswith(said)
    shard = (path / "model-00001-of-00002.safetensors").rename(tmp_path / "aside")
    for call in (twin.weights.load_model, describe, read):
        assert refusal(call, path) == (
            f"{index}: names model-00001-of-00002.safetensors, which is gone; model.safetensors"
            " beside it is whole: remove this index"
        )
    shard.rename(path / "model-00001-of-00002.safetensors")
    kept = index.read_bytes()
    index.unlink()
    assert_expected(twin, path, "07_stale_index")
    # The same numbers twice are one model.
    index.write_bytes(kept)
    weights = load_file(path / "model.safetensors")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name: weights[name] for name in load_file(path / file)}, path / file)
    assert_expected(twin, path, "07_stale_index")


@pytest.mark.parametrize(
    ("case", "file", "note"),
    [
        ("15_nested", "checkpoint.pt", "inside model_state_dict; left out: epoch"),
        ("16_two_models", "checkpoint_3", "17 tensors of expainable_llm.* left out"),
    ],
)
def test_checkpoints_of_the_family_are_read_inside(twin, tmp_path, capsys, case, file, note):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    given = CASES / case / "given-config.json"
    latents = ("--config", str(given), "--latent-ids", "257,258,259")
    out = converted(CASES / case / file, tmp_path / "out", *latents)
    assert note in capsys.readouterr().out
    state = torch.load(CASES / case / file, weights_only=True)
    state = state.get("model_state_dict", state)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_json_file(given)).eval()
    inner = "base_causallm."
    model.load_state_dict(
        {n.removeprefix(inner): w for n, w in state.items() if n.startswith(inner)}
    )
    ids = [5, 17, 99, 150, 3]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(last_logits(twin, out, ids) - theirs).max() < LOGITS


@pytest.mark.parametrize("where", ["state_dict", "model", "model_state_dict", "module"])
def test_a_state_dict_is_found_wherever_programs_put_it(tmp_path, where):
    torch = pytest.importorskip("torch")
    weights = {n: torch.from_numpy(w) for n, w in load_file(MODEL / "model.safetensors").items()}
    beside = {"optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "loss": torch.ones(())}
    torch.save({where: weights} | beside, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt", MODEL / "config.json")
    assert f"the state dict inside {where}; left out: optimizer, epoch, loss" in found.notes
    expected = read(MODEL).tensors
    assert all(t.is_same(expected[name]) for name, t in found.tensors.items())
    for rival in ({"ema": weights}, {"logit_scale": torch.ones(3)}):
        torch.save({where: weights} | rival, tmp_path / "b.pt")
        said = refusal(read, tmp_path / "b.pt", MODEL / "config.json")
        assert f"{where} and {min(rival)} both hold weights" in said


# ---- what transformers computes for GPT-2


def theirs(directory: Path, ids: list[int]) -> np.ndarray:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].numpy()


SETTINGS: list[dict[str, Any]] = [
    {"scale_attn_weights": False},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False, "layer_norm_epsilon": 0.5, "n_inner": 24},
    *({"activation_function": name} for name in ACTIVATIONS),
]


def gpt2_with(directory: Path, settings: dict[str, Any]) -> Path:
    """A random GPT-2 of two layers with these fields, weights large enough for them to matter."""
    random_gpt2(directory, 40, 16, n_layer=2, n_positions=12, std=0.5)
    config = read_json(directory / "config.json") | settings
    write_json(directory / "config.json", config)
    weights = load_file(directory / "model.safetensors")
    rng = np.random.default_rng(3)
    for name, shape in verdict.args_of(config).shapes().items():
        if name not in weights or weights[name].shape != shape:
            weights[name] = rng.standard_normal(shape).astype(np.float32) * np.float32(0.5)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("settings", few(SETTINGS, 8), ids=lambda s: " ".join(map(str, s.values())))
def test_every_setting_of_gpt2_is_computed_as_in_transformers(twin, tmp_path, settings):
    pytest.importorskip("transformers")
    ids = [3, 17, 39, 5, 11, 2]
    path = gpt2_with(tmp_path / "model", settings)
    ours, expected = last_logits(twin, path, ids), theirs(path, ids)
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()


def test_decoding_of_another_gpt2_equals_reading_all_again_for_each_token(twin, tmp_path):
    settings = {"scale_attn_weights": False, "activation_function": "relu"}
    path = gpt2_with(tmp_path / "model", settings | {"tie_word_embeddings": False})
    model, _, _ = twin.weights.load_model(path)
    batch = collate([as_row(i, ids, None) for i, ids in enumerate(([3, 17, 39], [5, 2]))], 0)
    written = twin.generate.generate(model, batch, batch.n_passes, Decoding(5, -1))
    for prompt, new in zip(([3, 17, 39], [5, 2]), written, strict=True):
        ids = list(prompt)
        for token in new:
            assert token == int(last_logits(twin, path, ids).argmax())
            ids.append(token)


@both
def test_the_twins_agree_on_gradients_of_another_gpt2(tmp_path):
    settings = {"scale_attn_by_inverse_layer_idx": True, "activation_function": "quick_gelu"}
    path = gpt2_with(tmp_path / "model", settings | {"tie_word_embeddings": False})
    batch = collate([as_row(0, [3, 17, 39, 5, 11], [-100, -100, 39, 5, 11])], 0)
    for options in ({}, {"checkpointing": True}):
        a, b = (run_model(load_twin(name), path, batch, **options) for name in CHOSEN)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert "lm_head.weight" in a.grads
        assert_same_gradients(a.grads, b.grads, GRADIENTS)


def test_an_untied_head_is_grown_trained_and_saved(twin, tmp_path):
    path = gpt2_with(tmp_path / "model", {"tie_word_embeddings": False})
    source = Source(read_json(path / "config.json"), path, 43, range(40, 43), 7)
    backend = twin.run.make_backend(RunConfig(method="coconut"), source)
    before = backend.weights()
    for name in ("wte.weight", "lm_head.weight"):
        assert before[name].shape == (43, 16)
        assert all(np.array_equal(row, before[name][7]) for row in before[name][40:])
    batch = collate([as_row(0, [3, 17, 39, 5, 11], [-100, -100, 39, 5, 11])], 0)
    backend.train_step([batch], 1e-2, (0,))
    (tmp_path / "saved").mkdir()
    backend.save(tmp_path / "saved", with_optimizer=True)
    after = backend.weights()
    moved = [name for name in after if not np.array_equal(after[name], before[name])]
    assert {"wte.weight", "lm_head.weight"} <= set(moved)
    ids = [3, 17, 42, 5]
    expected = theirs(tmp_path / "saved", ids)
    assert np.abs(last_logits(twin, tmp_path / "saved", ids) - expected).max() < LOGITS
    backend.load_optimizer(tmp_path / "saved")
    shapes = trained_shapes(source.config, Lora(rank=2), 3)
    assert shapes["wte.rows"] == shapes["lm_head.rows"] == (3, 16)


# ---- fields


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a field of nobody's": (
        {"attention_temperature": 0.5},
        "attention_temperature: not known here",
    ),
    "cross attention": (
        {"add_cross_attention": True},
        "add_cross_attention: expected nothing, since",
    ),
    "pruned heads": ({"pruned_heads": {"0": [1]}}, "pruned_heads: expected nothing, since"),
    "an activation with weights": ({"activation_function": "prelu"}, "expected one of gelu_new,"),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map: not known here"),
    "an alias that differs": ({"hidden_size": 65}, "hidden_size and n_embd differ"),
    "n_layer 10**9": ({"n_layer": 10**9}, "layers"),
    "n_embd 10**9": ({"n_embd": 10**9}, "n_embd: expected less than 2**24, got 1000000000"),
    "n_embd 10**7": ({"n_embd": 10**7, "n_head": 1}, "describes 4e+15 numbers"),
    "n_embd 2**40": (
        {"n_embd": 2**40},
        "n_embd: expected a whole number above 0, got 1099511627776",
    ),
    "n_embd text": ({"n_embd": "160"}, "n_embd: expected a whole number above 0, got '160'"),
    "n_embd list": ({"n_embd": [64]}, "n_embd: expected a whole number above 0, got [64]"),
    "n_embd true": ({"n_embd": True}, "n_embd: expected a whole number above 0, got True"),
    "n_head 0": ({"n_head": 0}, "n_head: expected a whole number above 0, got 0"),
    "n_head -2": ({"n_head": -2}, "n_head: expected a whole number above 0, got -2"),
    "n_head 3": ({"n_head": 3}, "width 64 cannot be divided among 3 heads"),
    "n_inner 0": ({"n_inner": 0}, "n_inner: expected a whole number above 0, got 0"),
    "embd_pdrop 2.0": ({"embd_pdrop": 2.0}, "embd_pdrop: expected a number from 0 to below 1"),
    "attn_pdrop 1": ({"attn_pdrop": 1}, "attn_pdrop: expected a number from 0 to below 1, got 1"),
    "resid_pdrop NaN": ({"resid_pdrop": float("nan")}, "resid_pdrop: expected a number from 0"),
    "epsilon null": ({"layer_norm_epsilon": None}, "layer_norm_epsilon: expected a number from 0"),
    "a flag 1": ({"scale_attn_weights": 1}, "scale_attn_weights: expected true or false, got 1"),
    "3 bits": ({"quantization": {"bits": 3}}, "quantization: expected mlx_lm's settings"),
    "7 bits": (
        {"quantization": {"bits": 7, "group_size": 64}},
        "quantization: expected mlx_lm's settings",
    ),
    "bits of nothing": (
        {"quantization": {"bits": 4, "group_size": 64}},
        "has no quantised weights",
    ),
    "others' bits": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config: expected mlx_lm's settings",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_config_is_refused_in_one_line_before_anything_is_built(
    twin, tmp_path, monkeypatch, what
):
    changes, message = REFUSED[what]
    path = model_directory(tmp_path / "model", **changes)
    monkeypatch.setattr(twin.gpt2, "Model", None)
    for call in (twin.weights.load_model, describe):
        said = refusal(call, path)
        assert message in said and "\n" not in said and said.startswith(str(path))
    said = refusal(read, path)
    assert message in said or "quantised weights are not converted" in said


def test_each_command_gives_the_same_verdict(twin, tmp_path, capsys):
    path = model_directory(tmp_path / "model", attention_temperature=0.5)
    asked = ["--model", str(path), "--question", "x"]
    run = {"method": "cot", "only_eval": True, "load_model_path": str(path)}
    run["val_path"] = str(write_items(tmp_path / "items.json", 2))
    write_json(tmp_path / "run.yaml", run)
    commands = (
        ["run", str(tmp_path / "run.yaml"), f"save_path={tmp_path}", "name=x"],
        ["run", str(tmp_path / "run.yaml"), f"save_path={tmp_path}", "name=x", "--check"],
        ["generate", *asked],
        ["inspect", *asked],
        ["convert", str(path), str(tmp_path / "out")],
    )
    said = set()
    for argv in commands:
        with pytest.raises(SystemExit) as stop:
            verbs.main(twin.__name__, twin.run.make_backend, twin.run.make_world, argv)
        assert stop.value.code == 2
        said.add(capsys.readouterr().err)
    assert said == {
        f"{path / 'config.json'}: attention_temperature: not known here, so it may change what the"
        " model computes; remove it if it does not\n"
    }


@pytest.mark.slow
def test_what_transformers_writes_of_itself_is_known():
    transformers = pytest.importorskip("transformers")
    for model_type in ("gpt2", "qwen2", *TRIED):
        made = transformers.CONFIG_MAPPING[model_type]()
        for whole in (made.to_dict(), made.to_diff_dict()):
            config = json.loads(json.dumps(whole, default=str)) | {"model_type": model_type}
            assert judged(config, "x")["model_type"] == model_type


@pytest.mark.parametrize("changes", [{"n_ctx": 256, "n_special": 0, "_num_labels": 1}, {}])
def test_a_config_by_the_common_names_is_the_same_model(twin, tmp_path, changes):
    path = model_directory(tmp_path / "model", **changes)
    config = read_json(path / "config.json")
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }
    write_json(path / "config.json", {names.get(n, n): v for n, v in config.items()})
    ids = [5, 17, 99]
    assert np.array_equal(last_logits(twin, path, ids), last_logits(twin, MODEL, ids))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen2", {"attention_bias": False}, "attention_bias: expected true, got False"),
        ("qwen2", {"rope_theta": -1.0}, "rope_theta: expected a number above 0"),
        ("qwen2", {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor is not known"),
        ("qwen2", {"logit_scale": 2.0}, "logit_scale: not known here"),
        ("qwen2", {"head_dim": 3}, "rotary positions turn pairs"),
        ("llama", {"clip_qkv": 8.0}, "clip_qkv: not known here"),
        (
            "llama",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers: expected at most 10,000 layers",
        ),
        ("llama", {"hidden_size": 0}, "hidden_size: expected a whole number above 0"),
        ("stablelm", {"clip_qkv": 8.0}, "clip_qkv: not known here"),
    ],
)
def test_fields_of_other_architectures_are_judged_too(twin, model_type, changes, message):
    config = read_json(MODELS / "qwen2-tiny/config.json")
    if model_type != "qwen2":
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": model_type}
    assert message in refusal(twin.models.build, config | changes, "x.json")


# ---- tensors


def with_tensors(path: Path, change: Any, model: Path = MODEL) -> Path:
    """A golden model with other tensors in its file."""
    path.mkdir()
    shutil.copy(model / "config.json", path)
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


FREQUENCIES = "model.rotary_emb.inv_freq"
TURNS = (1e6 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
NORM = "transformer.h.1.ln_1.bias"
TENSORS: dict[str, tuple[str, dict[str, np.ndarray], str]] = {
    "a mask that looks ahead": (
        "gpt2-tiny",
        {"transformer.h.0.attn.bias": np.ones((1, 1, 256, 256), np.uint8)},
        "transformer.h.0.attn.bias: not a causal mask",
    ),
    "a mask that hides little": (
        "gpt2-tiny",
        {"transformer.h.0.attn.masked_bias": np.array(-1.0, np.float32)},
        "transformer.h.0.attn.masked_bias: not a number like -10000",
    ),
    "other frequencies": (
        "qwen2-tiny",
        {FREQUENCIES: TURNS[::-1].copy()},
        f"{FREQUENCIES}: not the rotary frequencies of rope_theta 1e+06",
    ),
    "NaN": ("gpt2-tiny", {NORM: np.full(64, np.nan, np.float32)}, "h.1.ln_1.bias: not finite"),
    "infinity": ("gpt2-tiny", {NORM: np.full(64, np.inf, np.float32)}, "h.1.ln_1.bias: not finite"),
    "beyond float32": ("gpt2-tiny", {NORM: np.full(64, 1e300)}, "h.1.ln_1.bias: not finite"),
    "whole numbers": ("gpt2-tiny", {NORM: np.ones(64, np.int32)}, "h.1.ln_1.bias: type I32"),
    "another head": (
        "gpt2-tiny",
        {"lm_head.weight": np.ones((200, 64), np.float32)},
        "lm_head.weight",
    ),
    "a tensor more": ("gpt2-tiny", {"h.0.attn.gate": np.ones(4, np.float32)}, "h.0.attn.gate"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_is_not_computed_with_is_refused(twin, tmp_path, what):
    model, tensors, message = TENSORS[what]
    path = with_tensors(tmp_path / "model", lambda w: w.update(tensors), MODELS / model)
    assert message in refusal(twin.weights.load_model, path)
    assert message in refusal(read, path)


def test_constants_that_are_right_are_left_out(twin, tmp_path):
    masks = {"transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 256, 256), bool))}
    path = with_tensors(tmp_path / "a", lambda w: w.update(masks))
    assert np.array_equal(last_logits(twin, path, [5, 7]), last_logits(twin, MODEL, [5, 7]))
    qwen = MODELS / "qwen2-tiny"
    path = with_tensors(tmp_path / "b", lambda w: w.update({FREQUENCIES: TURNS}), qwen)
    assert np.array_equal(last_logits(twin, path, [5, 7]), last_logits(twin, qwen, [5, 7]))


def test_a_rule_that_is_not_finite_is_named(twin, tmp_path):
    save_file(
        {"feedback.mlp.w1": np.array([np.nan], np.float32)}, tmp_path / "feedback.safetensors"
    )
    said = refusal(twin.weights.load_feedback, tmp_path)
    assert said.endswith(
        "feedback.safetensors: feedback.mlp.w1: not finite: it holds NaN or infinity"
    )


@pytest.mark.parametrize(
    ("prefix", "config"),
    [("base_causallm.", {}), ("expainable_llm.", {}), ("module.", {}), ("", {"bot_id": 1})],
)
def test_what_only_convert_reads_says_so(twin, tmp_path, prefix, config):
    path = with_tensors(
        tmp_path / "model", lambda w: w.update({prefix + n: w.pop(n) for n in list(w)})
    )
    ids = {"eot_id": 2, "latent_token_id": 3} if config else {}
    write_json(path / "config.json", read_json(path / "config.json") | config | ids)
    said = refusal(twin.weights.load_model, path)
    assert f"python convert/torch_to_mlx.py {path} DIRECTORY" in said
