"""Adapters as files: checkpoints that point to a base, fusing, mlx_lm's and peft's layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from safetensors.numpy import load_file
from tiny import read_log, run_config, start

from coconut.checkpoints.named import checkpoint_config
from coconut.checkpoints.source import open_source
from coconut.commands.fuse import main as fuse
from coconut.commands.generate import main as ask
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.plan.plan import print_plan
from convert.torch_to_mlx import main as torch_to_mlx

LORA = {"type": "lora", "rank": 2, "targets": ["c_attn", "mlp.c_proj"], "scale": 3.0}
DORA = LORA | {"type": "dora", "rank": 4}

LOGITS = 2e-5
"""Absolute, of logits up to 4; observed 3e-6."""
QUESTION = "Tom is a lempus. Is Tom a jompus or zumpus?"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with data and a trained model without markers, in runs/base/epoch_01."""
    folder = tmp_path_factory.mktemp("base")
    start(load_twin(CHOSEN[0]), base_run(folder)).train()
    return folder


def base_run(folder: Path) -> RunConfig:
    return run_config(folder, name="base", method="cot", num_epochs=1)


def adapter_run(folder: Path, base: Path, lora: dict[str, Any] = LORA, **keys: Any) -> RunConfig:
    keys = {"model_id": str(base / "runs/base/epoch_01"), "lora": lora, "lr": 1e-2} | keys
    return run_config(folder, model_config_path=None, tokenizer=None, **keys)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(twin's name, kind) -> directory of a checkpoint with a trained adapter."""
    made: dict[tuple[str, str], Path] = {}

    def train(name: str, kind: str = "lora") -> Path:
        if (name, kind) not in made:
            config = adapter_run(
                tmp_path_factory.mktemp("adapter"), base, LORA if kind == "lora" else DORA, seed=3
            )
            start(load_twin(name), config).train()
            made[name, kind] = config.run_dir / "epoch_02"
        return made[name, kind]

    return train


def short(twin: ModuleType) -> str:
    return twin.__name__.removesuffix("_coconut")


def ids_of(directory: Path) -> list[int]:
    """A question with all three markers in it."""
    tokenizer = open_source(checkpoint_config(directory)).tokenizer
    markers = [tokenizer.start_id, tokenizer.latent_id, tokenizer.end_id]
    return [*tokenizer.encode_question(QUESTION), *markers]


def opened(twin: ModuleType, config: RunConfig) -> Any:
    """The back end that a run or a command makes."""
    return twin.run.make_backend(config, open_source(config).source)


def logits(twin: ModuleType, directory: Path, ids: list[int]) -> np.ndarray:
    """(T, V), latents as ordinary tokens."""
    engine = opened(twin, checkpoint_config(directory))
    if twin.__name__ == "cuda_coconut":
        import torch

        with torch.no_grad():
            x = engine.model.embed(torch.tensor([ids]))
            h = engine.model.trunk(x, torch.arange(len(ids))[None], "causal")
            return engine.model.head(h)[0].numpy()
    import mlx.core as mx

    from mlx_coconut.models.base import additive_mask

    mask = additive_mask(mx.ones((1, len(ids)), mx.bool_), 0, len(ids), mx.float32)
    x = engine.model.embed(mx.array([ids]))
    h = engine.model.trunk(x, mx.arange(len(ids))[None], mask)
    return np.array(engine.model.head(h)[0])


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_from_there(twin, base, tmp_path):
    unbroken = adapter_run(tmp_path, base, name="unbroken", num_epochs=3)
    start(twin, unbroken).train()
    assert not (unbroken.run_dir / "epoch_01/model.safetensors").exists()
    config = adapter_run(tmp_path, base, name="stopped", num_epochs=2)
    start(twin, config).train()
    config.num_epochs = 3
    start(twin, config).train()
    one, two = ([r["loss"] for r in read_log(c, "train")] for c in (config, unbroken))
    assert one == two
    for name in ("adapters.safetensors", "trained.safetensors", "optimizer.safetensors"):
        one, two = (c.run_dir / "epoch_03" / name for c in (config, unbroken))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")
@pytest.mark.slow
def test_a_run_stopped_in_one_twin_goes_on_in_the_other(base, tmp_path):
    ends = []
    for first, then in (("mlx", "cuda"), ("mlx", "mlx")):
        config = adapter_run(tmp_path, base, name=then, num_epochs=1)
        start(load_twin(first), config).train()
        config.num_epochs = 2
        start(load_twin(then), config).train()
        ends.append(read_log(config, "train")[-1]["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", few(["lora", "dora"], 1))
def test_a_fused_checkpoint_is_one_like_any_other(twin, trained, tmp_path, kind, capsys):
    directory, out = trained(short(twin), kind), tmp_path / "fused"
    fuse(twin.__name__, twin.run.make_backend, [str(directory), str(out)])
    ids = ids_of(directory)
    ours = logits(twin, directory, ids)
    np.testing.assert_allclose(logits(twin, out, ids), ours, atol=LOGITS)
    assert not (out / "adapter_config.json").exists()
    capsys.readouterr()
    for made in (directory, out):
        options = ["--model", str(made), "--question", QUESTION, "--max-new-tokens", "4"]
        ask(twin.__name__, twin.run.make_backend, options)
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and answers[0] == answers[1]
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    import torch

    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(theirs, ours, atol=LOGITS)


@pytest.mark.slow
def test_fusing_does_not_touch_what_is_there(twin, trained, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        fuse(twin.__name__, twin.run.make_backend, [str(trained(short(twin))), str(tmp_path)])
    assert stopped.value.code == 2


@pytest.mark.parametrize("kind", few(["lora", "dora"], 1))
@pytest.mark.slow
def test_mlx_lm_opens_an_adapter_on_its_base(twin, trained, tmp_path, kind):
    mx = pytest.importorskip("mlx.core")
    from mlx_lm import load

    directory, out = trained(short(twin), kind), tmp_path / "grown"
    fuse(twin.__name__, twin.run.make_backend, [str(directory), str(out), "--base-only"])
    model, _ = load(str(out), adapter_path=str(directory))
    ids = ids_of(directory)
    theirs = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(theirs, logits(twin, directory, ids), atol=LOGITS)


@pytest.mark.slow
# peft asks transformers for a name that it is about to drop.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", few(["lora", "dora"], 1))
def test_peft_opens_a_converted_adapter_and_it_comes_back(twin, trained, tmp_path, kind):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    directory, out, grown = trained(short(twin), kind), tmp_path / "peft", tmp_path / "grown"
    torch_to_mlx(["--adapter", str(directory), str(out)])
    fuse(twin.__name__, twin.run.make_backend, [str(directory), str(grown), "--base-only"])
    model = transformers.AutoModelForCausalLM.from_pretrained(grown)
    model = peft.PeftModel.from_pretrained(model, out)
    ids = ids_of(directory)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    ours = logits(twin, directory, ids)
    np.testing.assert_allclose(theirs, ours, atol=LOGITS)

    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    torch_to_mlx(
        ["--adapter", str(tmp_path / "theirs"), str(tmp_path / "plain"), "--base", str(grown)]
    )
    np.testing.assert_allclose(logits(twin, tmp_path / "plain", ids), ours, atol=LOGITS)

    torch_to_mlx(["--adapter", str(out), str(tmp_path / "back")])
    back = tmp_path / "back"
    assert (back / "coconut.json").read_bytes() == (directory / "coconut.json").read_bytes()
    for name, kept in (("trained", "wte.rows"), ("adapters", ".h.")):
        one, two = (load_file(d / f"{name}.safetensors") for d in (directory, back))
        same = [n for n in one if kept in n]
        assert same and all(np.array_equal(one[n], two[n]) for n in same)


def test_an_adapter_of_mlx_lm_becomes_a_checkpoint(base, tmp_path):
    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    plain, made = base / "runs/base/epoch_01", tmp_path / "theirs"
    model, _ = load(str(plain))
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["attn.c_attn"]}
    model.freeze()
    linear_to_lora_layers(model, 1, settings)
    own = {n: mx.random.normal(w.shape) for n, w in tree_flatten(model.trainable_parameters())}
    made.mkdir()
    mx.save_safetensors(str(made / "adapters.safetensors"), own)
    facts = {"num_layers": 1, "lora_parameters": settings, "model": str(plain)}
    (made / "adapter_config.json").write_text(json.dumps(facts))
    model, tokenizer = load(str(plain), adapter_path=str(made))
    torch_to_mlx(["--adapter", str(made), str(tmp_path / "ours")])
    ids = tokenizer.encode("Tom is a lempus.")
    theirs = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(
        logits(load_twin(CHOSEN[0]), tmp_path / "ours", ids), theirs, atol=LOGITS
    )


def test_the_other_converters_point_to_fusing(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        torch_to_mlx([str(trained(CHOSEN[0])), str(tmp_path / "out")])
    assert "holds an adapter" in capsys.readouterr().err


def test_an_adapter_that_we_cannot_express_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "peft"
    torch_to_mlx(["--adapter", str(trained(CHOSEN[0])), str(out)])
    settings = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["wte"]}))
    with pytest.raises(SystemExit):
        torch_to_mlx(["--adapter", str(out), str(tmp_path / "back")])
    assert "modules_to_save: not supported here" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", ["gone", "other weights"])
def test_a_base_that_is_gone_or_differs_is_one_clear_line(twin, base, tmp_path, change):
    moved = tmp_path / "base"
    shutil.copytree(base / "runs/base/epoch_01", moved)
    config = adapter_run(tmp_path, base, model_id=str(moved), num_epochs=1)
    start(twin, config).train()
    made = config.run_dir / "epoch_01"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(moved, elsewhere)
    if change == "gone":
        with pytest.raises(UserError, match=r"its base .* is gone; bring it back, or say where"):
            open_source(checkpoint_config(made))
        found = checkpoint_config(made)
        found.model_id = str(elsewhere)
        assert open_source(found).source.directory == elsewhere
        return
    other = run_config(tmp_path, name="other", method="cot", num_epochs=1, seed=1)
    start(twin, other).train()
    shutil.copytree(other.run_dir / "epoch_01", moved)
    with pytest.raises(UserError, match="trained beside other weights than"):
        open_source(checkpoint_config(made))


def test_another_adapter_than_the_one_found_is_refused(twin, trained, base, tmp_path):
    directory = str(trained(short(twin)))
    keys = {"load_model_path": directory, "model_id": None}
    with pytest.raises(UserError, match="holds an adapter; set the keys of lora"):
        open_source(adapter_run(tmp_path, base, {}, **keys))
    with pytest.raises(UserError, match=r"lora.rank: the adapter has 2, not 3"):
        open_source(adapter_run(tmp_path, base, LORA | {"rank": 3}, **keys))
    assert open_source(adapter_run(tmp_path, base, **keys)).source.adapter.rows


@pytest.mark.slow
def test_an_adapter_goes_on_in_a_run_of_its_own(twin, trained, base, tmp_path):
    directory = trained(short(twin))
    config = adapter_run(tmp_path, base, model_id=None, load_model_path=str(directory))
    start(twin, config).train()
    begun = read_log(adapter_run(directory.parents[2], base), "train")[0]["loss"]
    first = read_log(config, "train")[0]["loss"]
    assert first < begun  # the same rows, with what the adapter had learnt
    ids = ids_of(directory)
    before, after = (logits(twin, d, ids) for d in (directory, config.run_dir / "epoch_02"))
    assert np.abs(after - before).max() > 1e-3


def test_the_plan_says_what_is_trained(base, tmp_path, capsys):
    config = adapter_run(tmp_path, base)
    print_plan(config, "mlx_coconut")
    said = " ".join(capsys.readouterr().out.split())
    assert "trains" in said and "lora of rank 2, scale 3, on attn.c_attn, mlp.c_proj" in said
    whole = run_config(tmp_path, name="whole")
    print_plan(whole, "mlx_coconut")
    assert "trains" not in capsys.readouterr().out


def test_the_plan_refuses_what_the_torch_twin_cannot_do(base, tmp_path):
    config = adapter_run(tmp_path, base, LORA | {"quantize": 4, "group_size": 32})
    with pytest.raises(UserError, match="bitsandbytes needs CUDA"):
        print_plan(config, "cuda_coconut")
    print_plan(config, "mlx_coconut")


# ---- quantised bases: MLX only


@pytest.fixture
def quantized(base, tmp_path):
    """The base as mlx_lm quantises it: 4 bits, groups of 32."""
    pytest.importorskip("mlx.core")
    from mlx_lm import load
    from mlx_lm.utils import quantize_model, save

    plain, out = base / "runs/base/epoch_01", tmp_path / "q4"
    model, tokenizer, config = load(str(plain), return_config=True)
    model, config = quantize_model(model, config, 32, 4)
    save(out, str(plain), model, tokenizer, config)
    return out


needs_mlx = pytest.mark.skipif("mlx" not in CHOSEN, reason="TWINS leaves MLX out")


@needs_mlx
@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("how", ["on load", "already"])
@pytest.mark.slow
@pytest.mark.compiled
def test_an_adapter_learns_beside_a_quantised_base(base, quantized, tmp_path, lora, how):
    twin = load_twin("mlx")
    if how == "on load":
        config = adapter_run(tmp_path, base, lora | {"quantize": 8, "group_size": 32})
    else:
        config = adapter_run(tmp_path, base, lora, model_id=str(quantized))
    start(twin, config).train()
    made = config.run_dir / "epoch_02"
    losses = [r["loss"] for r in read_log(config, "train")]
    assert losses[1] < losses[0]
    ids, out = ids_of(made), tmp_path / "fused"
    fuse("mlx_coconut", twin.run.make_backend, [str(made), str(out)])
    np.testing.assert_allclose(logits(twin, out, ids), logits(twin, made, ids), atol=LOGITS)
    assert "quantization" not in json.loads((out / "config.json").read_text())
    engine = opened(twin, checkpoint_config(made))
    assert sum("scales" in name for name, _ in flat(engine.model)) > 4


@needs_mlx
def test_mlx_lm_opens_an_adapter_on_a_quantised_base_of_its_own(quantized, base, tmp_path):
    import mlx.core as mx
    from mlx_lm import load

    config = adapter_run(tmp_path, base, model_id=str(quantized), method="cot")
    start(load_twin("mlx"), config).train()
    made = config.run_dir / "epoch_02"
    model, tokenizer = load(str(quantized), adapter_path=str(made))
    ids = tokenizer.encode("Tom is a lempus.")
    theirs = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(logits(load_twin("mlx"), made, ids), theirs, atol=LOGITS)


@needs_mlx
def test_rows_that_a_quantised_base_is_given_leave_the_others_alone(quantized, base, tmp_path):
    config = adapter_run(tmp_path, base, model_id=str(quantized))
    grown = opened(load_twin("mlx"), config)
    plain = load_twin("mlx").weights.load_model(quantized)[0]
    old, new = plain.wte, grown.model.wte.base
    n = len(old.weight)
    assert len(new.weight) == n + 3
    for name in ("weight", "scales", "biases"):
        np.testing.assert_array_equal(np.array(new[name][:n]), np.array(old[name]))


@needs_mlx
@pytest.mark.parametrize("place", ["lora.quantize", "base"])
def test_pefts_layout_is_said_to_forget_quantised_weights(quantized, base, tmp_path, capsys, place):
    lora, keys = (LORA | {"quantize": 4}, {}) if place == "lora.quantize" else (LORA, {})
    keys = keys if place == "lora.quantize" else {"model_id": str(quantized)}
    config = adapter_run(tmp_path, base, lora, num_epochs=1, **keys)
    start(load_twin("mlx"), config).train()
    torch_to_mlx(["--adapter", str(config.run_dir / "epoch_01"), str(tmp_path / "out")])
    assert "trained beside 4-bit weights" in capsys.readouterr().out
    torch_to_mlx(["--adapter", str(tmp_path / "out"), str(tmp_path / "back")])


def test_quantised_weights_are_not_trained_whole(quantized, base, tmp_path):
    with pytest.raises(UserError, match="quantised weights cannot be trained; train beside them"):
        open_source(adapter_run(tmp_path, base, {}, model_id=str(quantized)))
    twice = LORA | {"quantize": 4}
    with pytest.raises(UserError, match="is quantised already"):
        open_source(adapter_run(tmp_path, base, twice, model_id=str(quantized)))


@pytest.mark.skipif("cuda" not in CHOSEN, reason="TWINS leaves torch out")
def test_torch_names_the_way_out_of_weights_quantised_by_mlx(quantized, base, tmp_path):
    config = adapter_run(tmp_path, base, model_id=str(quantized))
    with pytest.raises(UserError, match="quantised by MLX, which torch cannot read"):
        start(load_twin("cuda"), config)


def flat(model: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())
