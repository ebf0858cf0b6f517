"""Conversion: every layout is recognised, kept to the bit, and refused whole when it is broken."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_models import MODELS, TOKENS, as_row, golden
from safetensors.numpy import load_file, save_file
from tiny import MODEL, REPOSITORY

from coconut.batches.batch import collate
from coconut.batches.decoding import Decoding
from coconut.checkpoints.model_args import PUBLISHED_SHAPES
from coconut.convert import tensors
from coconut.convert.read import read
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.feedback.weights import shapes as feedback_shapes
from coconut.files import read_json, write_json
from convert import mlx_to_torch, torch_to_mlx

Weights = dict[str, np.ndarray]

IDS = [TOKENS["start"], TOKENS["end"], TOKENS["latent"]]
CONFIG = ["--config", str(MODEL / "config.json")]
NO_TOKENIZER = ["--tokenizer", "none"]
LATENTS = [*NO_TOKENIZER, "--latent-ids", ",".join(map(str, IDS))]
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def hub(model: Path = MODEL) -> Weights:
    """The golden weights by hub name."""
    weights = load_file(model / "model.safetensors")
    names = {name: name.removeprefix("transformer.") for name in weights}
    return {
        names[n]: w for n, w in weights.items() if n != "lm_head.weight" or "untied" in str(model)
    }


def official(weights: Weights | None = None) -> Weights:
    """The published Coconut layout: wrapped, the tied embedding under three names."""
    weights = hub() if weights is None else weights
    named = {f"base_causallm.transformer.{name}": w for name, w in weights.items()}
    copy = weights["wte.weight"]
    return named | {"base_causallm.lm_head.weight": copy, "embedding.weight": copy}


def plain() -> Weights:
    """The published CoT layout."""
    weights = hub()
    named = {f"transformer.{name}": w for name, w in weights.items()}
    return named | {"lm_head.weight": weights["wte.weight"]}


def port(prefix: str = "base_causallm.") -> Weights:
    """The MLX port's layout: Linear weights, masks as parameters, no `transformer.`."""
    weights = {}
    for name, w in hub().items():
        weights[prefix + name] = np.ascontiguousarray(w.T) if name.endswith(TURNED) else w
    for i in range(3):
        weights[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 256, 256), np.float32))
    return weights | ({"embedding.weight": weights[f"{prefix}wte.weight"]} if prefix else {})


def save_torch(path: Path, weights: Weights, **options) -> Path:
    """A torch file; what is one array stays one storage."""
    torch = pytest.importorskip("torch")
    shared: dict[int, object] = {}
    state = {n: shared.setdefault(id(w), torch.from_numpy(w.copy())) for n, w in weights.items()}
    torch.save(state, path, **options)
    return path


def save_flat(path: Path, weights: Weights) -> Path:
    save_file(weights, path)
    return path


def hf_directory(path: Path, model: Path = MODEL, **config) -> Path:
    """A Hugging Face directory without weights."""
    path.mkdir()
    write_json(path / "config.json", read_json(model / "config.json") | config)
    return path


def sharded(path: Path, ending: str, save: Callable[[Path, Weights], object]) -> Path:
    """A Hugging Face directory with its tensors in three files."""
    hf_directory(path)
    weights, weight_map = list(plain().items())[:-1], {}
    for i in range(3):
        file = f"{ending}-{i + 1:05d}-of-00003{ending[ending.rindex('.') :]}"
        save(path / file, dict(weights[i::3]))
        weight_map |= dict.fromkeys(dict(weights[i::3]), file)
    write_json(path / f"{ending}.index.json", {"weight_map": weight_map})
    return path


def wrapped(path: Path) -> Path:
    """As distributed, compiled, checkpointed training saves it; every copy a storage of its own."""
    weights = {}
    for name, w in official().items():
        name = name.replace("transformer.h", "_fsdp_wrapped_module.transformer._orig_mod.h")
        name = name.replace(".attn.", "._checkpoint_wrapped_module.attn.")
        weights[f"module.{name}"] = w.copy()
    return save_torch(path, weights)


def copied(path: Path, model: Path) -> Path:
    shutil.copytree(model, path)
    return path


def fork(path: Path) -> Path:
    ids = dict(zip(("bot_id", "eot_id", "latent_token_id"), IDS, strict=True))
    hf_directory(path, MODELS / "qwen2-tiny", replacement_method="-1", **ids)
    (path / "config.yaml").write_text("c_thought: 2\n")
    weights = hub(MODELS / "qwen2-tiny")
    save_torch(
        path / "pytorch_model.bin", weights | {"lm_head.weight": next(iter(weights.values()))}
    )
    return path


# What it is called, how it is made, the options it needs, the golden model inside.
KINDS = {
    "official Coconut state dict": (
        lambda p: save_torch(p / "checkpoint_3", official()),
        [*CONFIG, *LATENTS],
        "gpt2-tiny",
    ),
    "official Coconut state dict:": (
        lambda p: wrapped(p / "checkpoint_4"),
        [*CONFIG, *LATENTS],
        "gpt2-tiny",
    ),
    "official CoT state dict": (
        lambda p: save_torch(p / "checkpoint_5", plain()),
        [*CONFIG, *NO_TOKENIZER],
        "gpt2-tiny",
    ),
    "official CoT state dict:": (
        lambda p: save_torch(p / "checkpoint_6", plain(), _use_new_zipfile_serialization=False),
        [*CONFIG, *NO_TOKENIZER],
        "gpt2-tiny",
    ),
    "official CoT state dict as safetensors": (
        lambda p: save_flat(p / "checkpoint_7.safetensors", plain()),
        [*CONFIG, *NO_TOKENIZER],
        "gpt2-tiny",
    ),
    "flat safetensors of the MLX port's kind (Coconut)": (
        lambda p: save_flat(p / "checkpoint_8.safetensors", port()),
        [*CONFIG, *LATENTS],
        "gpt2-tiny",
    ),
    "flat safetensors of the MLX port's kind (CoT)": (
        lambda p: save_flat(p / "checkpoint_9.safetensors", port("")),
        [*CONFIG, *NO_TOKENIZER],
        "gpt2-tiny",
    ),
    "Hugging Face directory": (lambda p: copied(p / "hf", MODEL), NO_TOKENIZER, "gpt2-tiny"),
    "Hugging Face directory (3 shards)": (
        lambda p: sharded(p / "hf", "model.safetensors", save_flat),
        NO_TOKENIZER,
        "gpt2-tiny",
    ),
    "Hugging Face directory (pickled)": (
        lambda p: save_torch(hf_directory(p / "hf") / "pytorch_model.bin", plain()).parent,
        NO_TOKENIZER,
        "gpt2-tiny",
    ),
    "Hugging Face directory (3 shards, pickled)": (
        lambda p: sharded(p / "hf", "pytorch_model.bin", save_torch),
        NO_TOKENIZER,
        "gpt2-tiny",
    ),
    "Hugging Face directory: qwen2": (
        lambda p: copied(p / "hf", MODELS / "qwen2-tiny"),
        NO_TOKENIZER,
        "qwen2-tiny",
    ),
    "Hugging Face directory: qwen2, ": (
        lambda p: copied(p / "hf", MODELS / "qwen2-tiny-untied"),
        NO_TOKENIZER,
        "qwen2-tiny-untied",
    ),
    "the fork's folder (pickled)": (lambda p: fork(p / "fork"), NO_TOKENIZER, "qwen2-tiny"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_is_named_and_kept_to_the_bit(tmp_path, capsys, kind):
    make, options, model = KINDS[kind]
    source = make(tmp_path)
    torch_to_mlx.main([str(source), str(tmp_path / "out"), *options])
    assert kind in capsys.readouterr().out
    ours, expected = load_file(tmp_path / "out/model.safetensors"), hub(MODELS / model)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    config = read_json(tmp_path / "out/config.json")
    wanted = read_json(MODELS / model / "config.json")
    assert config == wanted
    if (tmp_path / "out/coconut.json").exists():
        assert read_json(tmp_path / "out/coconut.json")["latent_ids"] == IDS
    assert (tmp_path / "out/coconut.json").exists() == ("Coconut" in kind or "fork" in kind)


@pytest.mark.slow
def test_official_state_dict_gives_the_golden_ids(tmp_path, twin):
    source = save_torch(tmp_path / "checkpoint_9", official())
    torch_to_mlx.main([str(source), str(tmp_path / "out"), *CONFIG, *LATENTS])
    model, _, _ = twin.weights.load_model(tmp_path / "out")
    cases = [c for c in golden("generate") if c["model"] == "gpt2-tiny" and c["kind"] == "coconut"]
    assert cases
    for case in cases:
        inputs = case["inputs"]
        batch = collate([as_row(0, inputs["input_ids"], None)], pad_id=TOKENS["eos"])
        eos = inputs["eos_token_id"]
        decoding = Decoding(inputs["max_new_tokens"], eos)
        (ids,) = twin.generate.generate(model, batch, batch.n_passes, decoding)
        # The published code leaves out the eos it stops at, and goes on after one in first place.
        texts = [t[: t.index(eos)] if eos in t else t for t in (ids, case["outputs"]["new_tokens"])]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_through_the_official_layout_is_exact(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    first = {n: torch.from_numpy(w).to(getattr(torch, dtype)) for n, w in official().items()}
    torch.save(first, tmp_path / "checkpoint_1")
    torch_to_mlx.main([str(tmp_path / "checkpoint_1"), str(tmp_path / "a"), *CONFIG, *LATENTS])
    mlx_to_torch.main([str(tmp_path / "a"), "--official", str(tmp_path / "checkpoint_2")])
    second = torch.load(tmp_path / "checkpoint_2", weights_only=True)
    assert {n: (w.dtype, w.shape) for n, w in first.items()} == {
        n: (w.dtype, w.shape) for n, w in second.items()
    }
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch_to_mlx.main([str(tmp_path / "checkpoint_2"), str(tmp_path / "b"), *CONFIG, *LATENTS])
    a, b = tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors"
    assert a.read_bytes() == b.read_bytes()


def test_both_twins_read_bfloat16_as_the_same_float32(tmp_path, twin):
    torch = pytest.importorskip("torch")
    torch.save(
        {n: torch.from_numpy(w).bfloat16() for n, w in official().items()}, tmp_path / "half"
    )
    torch_to_mlx.main([str(tmp_path / "half"), str(tmp_path / "out"), *CONFIG, *LATENTS])
    found = read(tmp_path / "out")
    model, module, _ = twin.weights.load_model(tmp_path / "out")
    ours = twin.weights.to_numpy(twin.weights.hf_weights(model, module))
    for name, w in hub().items():
        expected = torch.from_numpy(w).bfloat16().float().numpy()
        assert np.array_equal(ours[name], expected), name
        assert np.array_equal(found.tensors[name].float32(), expected), name


@pytest.mark.parametrize("is_coconut", [True, False])
def test_the_published_wrapper_loads_the_official_file_strictly(tmp_path, is_coconut):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(MODEL))
    wrapper = torch.nn.Module()
    wrapper.base_causallm, wrapper.embedding = base, base.get_input_embeddings()
    if is_coconut:
        source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
        torch_to_mlx.main([str(source), str(tmp_path / "out"), *CONFIG, *LATENTS])
    else:
        torch_to_mlx.main([str(MODEL), str(tmp_path / "out"), *NO_TOKENIZER])
    mlx_to_torch.main([str(tmp_path / "out"), "--official", str(tmp_path / "checkpoint")])
    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    (wrapper if is_coconut else base).load_state_dict(state, strict=True)
    c_proj = base.transformer.h[0].attn.c_proj.weight.detach().numpy()
    assert np.array_equal(c_proj, hub()["h.0.attn.c_proj.weight"])


def test_a_large_model_is_sharded_and_read_by_both_twins(tmp_path, twin, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 300_000)
    torch_to_mlx.main([str(MODEL), str(tmp_path / "out"), *NO_TOKENIZER])
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3
    model, module, _ = twin.weights.load_model(tmp_path / "out")
    ours = twin.weights.to_numpy(twin.weights.hf_weights(model, module))
    assert all(np.array_equal(ours[name], w) for name, w in hub().items())


# ---- what a bare state dict does not say


def test_config_is_inferred_from_published_shapes_and_said(tmp_path, capsys, monkeypatch):
    shape = {"n_embd": 64, "n_layer": 3, "n_positions": 256}
    monkeypatch.setitem(PUBLISHED_SHAPES, "golden", shape | {"n_head": 4})
    source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
    torch_to_mlx.main([str(source), str(tmp_path / "out"), *LATENTS])
    said = capsys.readouterr().out
    assert "n_layer 3, n_embd 64, n_positions 256, vocab_size 200, n_head 4" in said
    config, golden_config = (read_json(d / "config.json") for d in (tmp_path / "out", MODEL))
    same = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_inner", "n_head")
    assert {k: config[k] for k in same} == {k: golden_config[k] for k in same}


def test_heads_are_never_guessed(tmp_path, capsys):
    source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
    said = refusal(capsys, [str(source), str(tmp_path / "out"), *LATENTS])
    assert "3 layers of width 64 and 256 positions are no published GPT-2" in said
    assert "give its config.json with --config" in said


def test_schedule_is_the_published_one_unless_told(tmp_path, capsys):
    source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
    torch_to_mlx.main([str(source), str(tmp_path / "a"), *CONFIG, *LATENTS])
    assert "assumed as in the published ProsQA run: stage 7, c_thought 1" in capsys.readouterr().out
    told = ["--stage", "3", "--c-thought", "2", "--max-latent-stage", "3"]
    torch_to_mlx.main([str(source), str(tmp_path / "b"), *CONFIG, *LATENTS, *told])
    assert "assumed" not in capsys.readouterr().out
    first, second = (read_json(tmp_path / name / "coconut.json") for name in "ab")
    assert first == {
        "format_version": 1,
        "method": "coconut",
        "feedback": "last",
        "stage": 7,
        "c_thought": 1,
        "max_latent_stage": 6,
        "pad_latent_to_max": True,
        "latent_growth": "stage",
        "labelled_thoughts": False,
        "latent_ids": IDS,
    }
    assert second == first | {"stage": 3, "c_thought": 2, "max_latent_stage": 3}


def one_layer(path: Path) -> list[str]:
    """The options that say what `with_rows` is."""
    write_json(path, read_json(MODEL / "config.json") | {"n_layer": 1})
    return ["--config", str(path)]


def with_rows(n: int) -> Weights:
    """A Coconut state dict of one narrow layer with n rows, 64 wide."""
    weights = {k: w for k, w in hub().items() if not k.startswith(("h.1", "h.2"))}
    rng = np.random.default_rng(0)
    return official(weights | {"wte.weight": rng.standard_normal((n, 64)).astype(np.float32)})


@pytest.mark.slow
def test_gpt2_vocabulary_brings_the_gpt2_tokenizer(tmp_path):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs TIKTOKEN_CACHE_DIR with the GPT-2 vocabulary")
    source = save_torch(tmp_path / "checkpoint_1", with_rows(50260))
    torch_to_mlx.main([str(source), *one_layer(tmp_path / "config-1.json")])
    out = tmp_path / "checkpoint_1-mlx"
    assert read_json(out / "coconut.json")["latent_ids"] == [50257, 50258, 50259]
    assert read_json(out / "encoding.json")["special_tokens"]["<|latent|>"] == 50259
    assert read_json(out / "config.json")["eos_token_id"] == 50256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "brings no tokenizer, and 200 rows do not tell which"),
        (["--tokenizer", "prosqa"], "needs 2,597 rows, the model has 200"),
        (NO_TOKENIZER, "need --latent-ids"),
        ([*NO_TOKENIZER, "--latent-ids", "1,2,200"], "expected three rows among 200"),
        ([*NO_TOKENIZER, "--latent-ids", "1,2,2"], "expected three rows among 200"),
        ([*LATENTS, "--config", str(MODELS / "qwen2-tiny")], "model_type qwen2"),
    ],
)
def test_facts_that_do_not_fit_are_refused(tmp_path, capsys, options, message):
    source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
    given = [] if "--config" in options else CONFIG
    assert message in refusal(capsys, [str(source), str(tmp_path / "out"), *given, *options])
    assert sorted(p.name for p in tmp_path.iterdir()) == [source.name]


def test_tokenizer_and_options_must_agree_on_the_latents(tmp_path, capsys):
    source = save_flat(tmp_path / "checkpoint_1.safetensors", with_rows(2597))
    known = one_layer(tmp_path / "config-1.json")
    options = ["--tokenizer", "prosqa", "--latent-ids", "1,2,3"]
    said = refusal(capsys, [str(source), *known, *options])
    assert "--latent-ids says [1, 2, 3]; the tokenizer says [2594, 2595, 2596]" in said
    torch_to_mlx.main([str(source), *known, "--tokenizer", "prosqa"])
    out = tmp_path / "checkpoint_1.safetensors-mlx"
    assert read_json(out / "coconut.json")["latent_ids"] == [2594, 2595, 2596]


# ---- what is refused


def refusal(capsys, arguments: list[str]) -> str:
    """The message of a refused conversion: status 2, nothing on the way to a traceback."""
    with pytest.raises(SystemExit) as stop:
        torch_to_mlx.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def flat(change: Callable[[Weights], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        weights = port()
        change(weights)
        return save_flat(folder / "x.safetensors", weights)

    return make


def torch_file(change: Callable) -> Callable[[Path], Path]:
    """A torch file of whatever `change` makes of a state dict."""

    def make(folder: Path) -> Path:
        torch = pytest.importorskip("torch")
        torch.save(change(torch), folder / "checkpoint_1")
        return folder / "checkpoint_1"

    return make


def cut(make: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    def make_cut(folder: Path) -> Path:
        path = make(folder)
        os.truncate(path, int(path.stat().st_size * keep))
        return path

    return make_cut


class Payload:
    """Unpickled by an unsafe reader, it would make a file."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def bare_pickle(folder: Path) -> Path:
    path = folder / "checkpoint_1"
    path.write_bytes(pickle.dumps({"embedding.weight": Payload()}))
    return path


def compressed(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "checkpoint_1", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 100)
    return folder / "checkpoint_1"


def text(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "x").write_bytes(content)
        return folder / "x"

    return make


def directory(**config) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = hf_directory(folder / "hf", **config)
        shutil.copyfile(MODEL / "model.safetensors", path / "model.safetensors")
        return path

    return make


def led_out(folder: Path) -> Path:
    path = hf_directory(folder / "hf")
    write_json(path / "pytorch_model.bin.index.json", {"weight_map": {"wte.weight": "../x"}})
    return path


NAME = "base_causallm.h.1.ln_1.bias"
NO_DROPOUT = dict.fromkeys(
    ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0
)
BROKEN = {
    "a missing tensor": (flat(lambda w: w.pop(NAME)), "h.1.ln_1.bias: missing"),
    "an extra tensor": (
        flat(lambda w: w.update(feedback=np.ones(3, np.float32))),
        "feedback: not a tensor of this model",
    ),
    "a mis-shaped tensor": (
        flat(lambda w: w.update({NAME: np.ones(65, np.float32)})),
        "h.1.ln_1.bias: shape (65,), expected (64,)",
    ),
    "one layer turned": (
        flat(
            lambda w: w.update({n: w[n].T.copy() for n in w if n.endswith("h.1.mlp.c_fc.weight")})
        ),
        "h.1.mlp.c_fc.weight: shape (256, 64), expected (64, 256)",
    ),
    "a bias named like a mask": (
        flat(lambda w: w.update({"base_causallm.h.0.attn.bias": np.ones((2, 3), np.float32)})),
        "h.0.attn.bias: not a causal mask",
    ),
    "an integer weight": (
        flat(lambda w: w.update({NAME: np.ones(64, np.int8)})),
        "h.1.ln_1.bias: type I8, expected one of F32, F16, BF16",
    ),
    "a tied copy of other numbers": (
        flat(lambda w: w.update({"embedding.weight": w["embedding.weight"] + 1})),
        "embedding.weight: not the same numbers as wte.weight",
    ),
    "a name under two prefixes": (
        flat(lambda w: w.update({f"module.{NAME}": w[NAME]})),
        "h.1.ln_1.bias: there twice",
    ),
    "a hostile name": (
        flat(lambda w: w.update({"a\n\x1b[2J" * 50: w[NAME]})),
        r"'a\n\x1b[2Ja\n",
    ),
    "another model": (
        flat(lambda w: [w.pop(n) for n in list(w) if "wte" in n]),
        "not the tensors of gpt2 or qwen2; the first are: base_causallm.h.0.",
    ),
    "truncated safetensors": (cut(flat(lambda w: None), 0.9), "truncated"),
    "truncated header": (cut(flat(lambda w: None), 0.001), "truncated"),
    "truncated torch": (
        cut(lambda p: save_torch(p / "checkpoint_1", official()), 0.7),
        "truncated or damaged, torch cannot read it",
    ),
    "a reduce payload": (
        torch_file(lambda torch: {"embedding.weight": Payload()}),
        "refused by torch's weights-only reader (it names",
    ),
    "a reduce payload in a bare pickle": (bare_pickle, "refused by torch's weights-only reader"),
    "a compressed zip": (compressed, "a compressed zip"),
    "a trainer's dictionary": (
        torch_file(lambda torch: {"epoch": 3, "weights": {"a": torch.ones(1)}}),
        "epoch: a int, expected a tensor",
    ),
    "a list": (torch_file(lambda torch: [torch.ones(1)]), "holds a list, expected a state dict"),
    "more axes than numpy has": (
        torch_file(lambda torch: {"wte.weight": torch.ones([1] * 70)}),
        "wte.weight: 70 axes, at most 32",
    ),
    "a few bytes of any size": (
        torch_file(lambda torch: {"wte.weight": torch.ones(1).expand(10**12)}),
        "wte.weight: its shape is larger than its data",
    ),
    "a sparse tensor": (
        torch_file(lambda torch: {"wte.weight": torch.ones(2, 2).to_sparse()}),
        "wte.weight: a torch.float32 tensor of a kind that is not read",
    ),
    "a text file": (text(b"these are no weights at all\n"), "neither safetensors nor a torch file"),
    "an empty file": (text(b""), "neither safetensors nor a torch file"),
    "a silly number of layers": (directory(n_layer=10**9), "1000000000 layers in the config, 3 in"),
    "a config of other shapes": (directory(n_positions=255), "wpe.weight: shape (256, 64)"),
    "a config without numbers": (directory(n_embd="64"), "n_embd: expected a whole number above 0"),
    "a config of another model": (directory(model_type="qwen2"), "but the weights are gpt2's"),
    "a config of a borrowed model": (
        directory(model_type="llama", **NO_DROPOUT),
        "but the weights are gpt2's",
    ),
    "a config of an unknown model": (directory(model_type="t5"), "'t5' is not supported"),
    "a shard outside": (led_out, "weight_map must map each tensor to a file of this directory"),
    "a directory without weights": (lambda p: hf_directory(p / "hf"), "no weights: expected"),
    "nothing": (lambda p: p / "nothing", "no such file or directory"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("what", BROKEN)
def test_broken_input_is_named_and_nothing_written(tmp_path, capsys, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    make, message = BROKEN[what]
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config = [] if source.is_dir() else CONFIG
    said = refusal(capsys, [str(source), str(tmp_path / "out"), *config, *LATENTS])
    assert message in said
    assert said.startswith(f"{source}") and len(said) < 800
    assert said.count("\n") < 10 and all(line.isprintable() for line in said.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_part_of_a_directory_is_not_taken_for_a_bare_state_dict(tmp_path, capsys):
    source = copied(tmp_path / "hf", MODEL) / "model.safetensors"
    said = refusal(capsys, [str(source), str(tmp_path / "out"), *NO_TOKENIZER])
    assert f"part of the directory {tmp_path / 'hf'}" in said


def test_an_existing_target_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    said = refusal(capsys, [str(MODEL), str(tmp_path / "out"), *NO_TOKENIZER])
    assert "exists already" in said
    with pytest.raises(SystemExit):
        mlx_to_torch.main([str(MODEL), "--official", str(tmp_path / "out/mine")])
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_a_torch_file_without_torch_says_what_to_install(tmp_path, capsys, monkeypatch):
    source = save_torch(tmp_path / "checkpoint_1", official())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch: pip install torch" in refusal(capsys, [str(source)])


# ---- the commands


@pytest.mark.parametrize("command", [["convert/torch_to_mlx.py"], ["-m", "convert.torch_to_mlx"]])
def test_command_runs_as_a_file_and_as_a_module(tmp_path, command):
    arguments = [sys.executable, *command, str(MODEL), str(tmp_path / "out"), *NO_TOKENIZER]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}: 40 tensors"


def test_conversion_imports_no_framework_for_safetensors():
    code = (
        "import sys; from coconut.convert import read, write, command, verify;"
        "from convert import torch_to_mlx, mlx_to_torch;"
        f"from pathlib import Path; read.read(Path({str(MODEL)!r}));"
        "print({'torch', 'mlx', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("argument", ["--stage=-1", "--latent-ids=1,2", "--c-thought=x"])
def test_arguments_are_checked(capsys, argument):
    assert f"argument {argument.split('=')[0]}: invalid" in refusal(capsys, ["x", argument])


# ---- verification


def test_verify_finds_converted_logits_the_same(tmp_path, capsys):
    source = save_flat(tmp_path / "checkpoint_1.safetensors", port())
    torch_to_mlx.main([str(source), str(tmp_path / "out"), *CONFIG, *LATENTS])
    mlx_to_torch.main([str(tmp_path / "out"), "--official", str(tmp_path / "checkpoint_1")])
    for ours, theirs in ((source, tmp_path / "out"), (tmp_path / "out", tmp_path / "checkpoint_1")):
        capsys.readouterr()
        torch_to_mlx.main(["--verify", str(ours), str(theirs)])
        assert capsys.readouterr().out.startswith("same: largest gap ")


def test_verify_sees_a_square_matrix_turned(tmp_path, capsys):
    weights = load_file(MODEL / "model.safetensors")
    (name,) = [n for n in weights if n.endswith("h.1.attn.c_proj.weight")]
    target = copied(tmp_path / "out", MODEL)
    save_file(weights | {name: weights[name].T.copy()}, target / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        torch_to_mlx.main(["--verify", str(MODEL), str(target)])
    assert stop.value.code == 1
    assert capsys.readouterr().out.startswith("DIFFERENT: largest gap ")


def ruled(path: Path, rule: str) -> Path:
    """Our checkpoint directory of a model that thinks by this rule, the rule's weights and all."""
    copied(path, MODEL)
    made = {"format_version": 1, "method": "coconut", "feedback": rule, "latent_ids": IDS}
    write_json(path / "coconut.json", made)
    rng = np.random.default_rng(0)
    shapes = feedback_shapes(parse(rule), 3, 64).items()
    own = {f"feedback.{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes}
    if own:
        save_file(own, path / "feedback.safetensors")
    return path


def test_verify_thinks_by_the_checkpoints_own_rule(tmp_path, capsys):
    source = ruled(tmp_path / "source", "layer:1|mlp:8|noise:0.1,when=always")
    torch_to_mlx.main([str(source), str(tmp_path / "out")])
    mlx_to_torch.main([str(source), "--official", str(tmp_path / "checkpoint_1")])
    assert "feedback layer:1|mlp:8|noise:0.1,when=always: not part of that layout" in (
        capsys.readouterr().out
    )
    for target in ("out", "checkpoint_1"):
        torch_to_mlx.main(["--verify", str(source), str(tmp_path / target)])
        said = capsys.readouterr().out
        assert said.startswith("same: ") and "by layer:1|mlp:8|noise:0.1" in said
    other = ruled(tmp_path / "other", "last")
    for target in (other, ruled(tmp_path / "weights", "layer:1|mlp:8|noise:0.1,when=always")):
        if target is not other:
            own = load_file(target / "feedback.safetensors")
            own["feedback.mlp.w2"] *= 2
            save_file(own, target / "feedback.safetensors")
        with pytest.raises(SystemExit) as stop:
            torch_to_mlx.main(["--verify", str(source), str(target)])
        assert stop.value.code == 1 and capsys.readouterr().out.startswith("DIFFERENT")


@pytest.mark.parametrize("rule", ["shuffle", "soft", "token"])
def test_verify_runs_rules_that_need_other_rows_or_the_vocabulary(tmp_path, capsys, rule):
    torch_to_mlx.main(
        ["--verify", str(ruled(tmp_path / "a", rule)), str(ruled(tmp_path / "b", rule))]
    )
    assert capsys.readouterr().out.startswith("same: ")


def test_the_forks_name_of_a_rule_is_read_as_ours(tmp_path, capsys):
    source = fork(tmp_path / "fork")
    config = read_json(source / "config.json") | {"replacement_method": "hs+supressed[0.5:]"}
    write_json(source / "config.json", config)
    torch_to_mlx.main([str(source), str(tmp_path / "out"), "--tokenizer", "none"])
    assert "feedback last+suppressed_fork:0.5" in capsys.readouterr().out
    assert read_json(tmp_path / "out/coconut.json")["feedback"] == "last+suppressed_fork:0.5"
    torch_to_mlx.main(["--verify", str(source), str(tmp_path / "out")])
    assert "by last+suppressed_fork:0.5" in capsys.readouterr().out
    write_json(source / "config.json", config | {"replacement_method": "-7!"})
    said = refusal(capsys, [str(source), str(tmp_path / "no"), "--tokenizer", "none"])
    assert "replacement_method: unknown source '-7!'" in said


def test_reading_never_changes_the_numbers(tmp_path):
    found = read(save_flat(tmp_path / "checkpoint_1.safetensors", port()), MODEL)
    assert found.notes == [
        "Linear layout (out, in): the four matrices of each layer are turned",
        "embedding.weight: the tied embedding again",
        "3 constants dropped (masks, rotary frequencies)",
    ]
    assert all(np.array_equal(found.tensors[n].data, w) for n, w in hub().items())


def test_a_directory_takes_no_config(tmp_path):
    with pytest.raises(UserError, match="has its own config"):
        read(MODEL, MODEL)
