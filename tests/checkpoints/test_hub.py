"""Models of the hub, against a stand-in of it: what is fetched, when, and what is said if not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from golden_models import MODELS
from hub_standin import TOKEN, Handler, Hub, serving
from safetensors.numpy import load_file
from tiny import REPOSITORY, chat_model, data_set_config, read_log, run_config, start, write_items

from coconut.checkpoints.hub import fetch
from coconut.checkpoints.source import open_source
from coconut.commands.run import main
from coconut.config.keys import RunConfig
from coconut.config.reading import load_config
from coconut.convert.tensors import Tensor, write_safetensors
from coconut.errors import UserError
from coconut.plan.plan import print_plan
from coconut.tasks.words import CONCEPTS, NAMES

ENTRIES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EOS = "<eos>"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with serving(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def write_tokenizer(directory: Path) -> None:
    """Words of ProsQA, one token each, in the files of a Hugging Face tokenizer."""
    words = ["?", EOS, "<<", "###", ".", "Every", "is", "a", "Is", "or"]
    words += [*NAMES, *CONCEPTS]
    vocabulary = {word: i for i, word in enumerate(words)}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.add_special_tokens([tokenizers.AddedToken(EOS, special=True)])
    engine.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))


def model(path: Path, name: str = "qwen2-tiny") -> Path:
    """A golden model and a tokenizer, as one would upload them."""
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        (path / file).write_bytes((MODELS / name / file).read_bytes())
    write_tokenizer(path)
    return path


def sharded(path: Path) -> dict[str, np.ndarray]:
    """The golden Qwen2 in bfloat16 and two files. Returns its weights."""
    model(path)
    weights = load_file(path / "model.safetensors")
    halves = {n: (w.view(np.uint32) >> 16).astype(np.uint16) for n, w in weights.items()}
    (path / "model.safetensors").unlink()
    names = sorted(halves)
    where = {n: ENTRIES[i >= len(names) // 2] for i, n in enumerate(names)}
    for file in ENTRIES:
        part = {n: Tensor("BF16", halves[n]) for n in names if where[n] == file}
        write_safetensors(path / file, part)
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return {n: (h.astype(np.uint32) << 16).view(np.float32) for n, h in halves.items()}


def config(tmp_path: Path, **keys) -> RunConfig:
    return run_config(tmp_path, **{"model_config_path": None, "tokenizer": None, **keys})


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ---- runs


@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen2-tiny"])
@pytest.mark.slow
def test_a_run_trains_and_evaluates_a_model_of_the_hub(twin, hub, tmp_path, monkeypatch, name):
    hub.add("someone/" + name, model(tmp_path / "files", name))
    run = config(tmp_path, model_id="someone/" + name)
    start(twin, run).train()
    losses = [line["loss"] for line in read_log(run, "train")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert json.loads((run.run_dir / "summary.json").read_text())["n"] == 4
    # The second time from the cache alone.
    offline(monkeypatch)
    n_requests = len(hub.requests)
    again = config(tmp_path, model_id="someone/" + name, name="again")
    start(twin, again).train()
    assert [line["loss"] for line in read_log(again, "train")] == losses
    assert len(hub.requests) == n_requests


def test_shards_in_bfloat16_become_float32_masters(twin, hub, tmp_path):
    weights = sharded(tmp_path / "files")
    hub.add("someone/model", tmp_path / "files")
    runner = start(twin, config(tmp_path, model_id="someone/model", method="cot"))
    runner.console.close()
    found = runner.backend.weights()
    assert found.keys() == weights.keys()
    for tensor, w in weights.items():
        assert found[tensor].dtype == np.float32
        np.testing.assert_array_equal(found[tensor], w)


def test_a_checkpoint_of_the_hub_is_evaluated_and_asked(twin, hub, tmp_path, capsys):
    run = run_config(tmp_path, num_epochs=1)
    start(twin, run).train()
    hub.add("someone/trained", run.run_dir / "epoch_01")
    keys = {"model_id": "someone/trained", "model_config_path": None, "tokenizer": None}
    evaluation = run_config(tmp_path, name="eval", only_eval=True, **keys)
    start(twin, evaluation).evaluate_once()
    summary = json.loads((evaluation.run_dir / "summary.json").read_text())
    assert (summary["checkpoint"], summary["n"]) == ("someone/trained", 4)
    from coconut.commands import generate

    capsys.readouterr()
    argv = [
        "--model",
        "someone/trained",
        "--question",
        "Tom is a wumpus. Is Tom a wumpus?",
    ]
    generate.main(twin.__name__, twin.run.make_backend, [*argv, "--max-new-tokens", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["latents"] == 0
    assert not [name for name in hub.fetched() if "optimizer" in name or "trainer" in name]


@pytest.mark.slow
def test_the_command_reads_the_hub_by_its_environment_variables(twin, hub, tmp_path):
    hub.add("owner/tiny-qwen2", model(tmp_path / "files"), private=True)
    run = config(tmp_path, model_id="owner/placeholder", num_epochs=1)
    (tmp_path / "x.yaml").write_text(run.to_yaml())
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-m", f"{twin.__name__}.run", str(tmp_path / "x.yaml")]
    done = subprocess.run(
        [*command, "model_id=owner/tiny-qwen2"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\neval " in done.stdout
    assert (tmp_path / "home/hub/models--owner--tiny-qwen2").is_dir()


# ---- what is fetched


def test_only_what_a_run_reads_is_fetched(hub, tmp_path):
    files = model(tmp_path / "files")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "optimizer.safetensors"):
        (files / name).write_bytes(b"x")
    (files / "onnx").mkdir()
    (files / "feedback.safetensors").write_bytes(b"a rule's weights")
    for name in ("onnx/model.safetensors", "onnx/config.json", "training_args.bin", "evil.py"):
        (files / name).write_bytes(b"x")
    hub.add("someone/model", files)
    directory = fetch("someone/model")
    wanted = [
        "config.json",
        "feedback.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(hub.fetched()) == wanted
    assert sorted(p.name for p in directory.iterdir()) == wanted


def test_the_description_comes_before_the_weights(hub, tmp_path):
    hub.add("someone/model", model(tmp_path / "files"))
    fetch("someone/model")
    assert hub.fetched()[-1] == "model.safetensors"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path):
    repo = hub.add("someone/model", model(tmp_path / "main"))
    other = model(tmp_path / "other", "qwen2-tiny-untied")
    hub.add("someone/model", other, branch="v1")
    sha = repo.branches["v1"][0]
    for revision in ("v1", sha):
        found = fetch("someone/model", revision)
        assert found.name == sha
        assert (found / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert fetch("someone/model").name == repo.branches["main"][0]


def test_the_runs_revision_is_the_one_fetched(hub, tmp_path):
    hub.add("someone/model", model(tmp_path / "main", "gpt2-tiny"))
    hub.add("someone/model", model(tmp_path / "other"), branch="v1")
    keys = {"model_id": "someone/model", "model_revision": "v1"}
    assert open_source(config(tmp_path, **keys)).source.config["model_type"] == "qwen2"


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("someone/model", model(tmp_path / "files"), gated=True)
    fetch("someone/model")
    for _, path, headers in hub.requests:
        expected = None if path.startswith("/cdn/") else f"Bearer {TOKEN}"
        assert headers.get("authorization") == expected, path


def test_check_describes_a_model_without_its_weights(hub, tmp_path, capsys):
    hub.add("someone/model", model(tmp_path / "files"))
    print_plan(config(tmp_path, model_id="someone/model"), "mlx_coconut")
    out = capsys.readouterr().out
    n_weights = sum(w.size for w in load_file(MODELS / "qwen2-tiny/model.safetensors").values())
    assert f"someone/model {n_weights:,} params" in out.splitlines()[0]
    assert "estimated peak memory" in out and "?" not in out
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("keys", [{}, {"only_eval": True}, {"method": "sft"}], ids=str)
def test_check_of_a_data_set_run_fetches_no_weights_and_says_which_a_run_would(
    hub, tmp_path, capsys, keys
):
    hub.add("someone/model", chat_model(tmp_path / "files"))
    config = data_set_config(tmp_path, model_id="someone/model", **({"method": "latro"} | keys))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    argv = [str(tmp_path / "run.yaml"), "--check", "rloo_k=4"][: 2 + (config.method == "latro")]
    main("mlx_coconut", None, argv)
    said = capsys.readouterr().out
    line = "a run would fetch from the hub: someone/model: model.safetensors\n"
    assert line in said and "estimated peak memory" in said
    assert "config.json" in hub.fetched() and "model.safetensors" not in hub.fetched()
    assert not (tmp_path / "runs").exists()
    fetch("someone/model")
    main("mlx_coconut", None, argv)
    assert "would fetch" not in capsys.readouterr().out


def test_check_of_a_model_out_of_reach_counts_the_updates_all_the_same(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = data_set_config(tmp_path, model_id="someone/model", method="latro", rloo_k=4)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    main("mlx_coconut", None, [str(tmp_path / "run.yaml"), "--check"])
    said = capsys.readouterr().out
    assert "someone/model: its description, tokenizer and weights\n" in said
    assert "updates of 12 prompts x 4 rationales" in said


# ---- a connection that breaks


def test_a_cut_file_goes_on_where_it_was_cut(hub, tmp_path):
    files = model(tmp_path / "files")
    hub.add("someone/model", files)
    fetch("someone/model", with_weights=False)
    hub.cuts = 2
    directory = fetch("someone/model")
    size = (files / "model.safetensors").stat().st_size
    ranges = [h.get("range") for _, path, h in hub.requests if path.startswith("/cdn/")]
    first, *begins = [r and int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges]
    assert first is None
    # What came in whole chunks of the client is kept.
    assert begins == pytest.approx([size / 2, size * 3 / 4], abs=2000)
    weights = directory / "model.safetensors"
    assert weights.read_bytes() == (files / "model.safetensors").read_bytes()


def test_whole_files_are_kept_for_the_next_run(hub, tmp_path, monkeypatch):
    sharded(tmp_path / "files")
    hub.add("someone/model", tmp_path / "files")
    fetch("someone/model", with_weights=False)
    last = hub.repos["someone/model"].branches["main"][1][ENTRIES[1]]
    whole = Handler._content

    def content(self, data, headers):
        if data != last:
            whole(self, data, headers)
            return
        self._send(200, b"", headers | {"Content-Length": str(len(data))})
        self.close_connection = True  # before the first byte

    monkeypatch.setattr(Handler, "_content", content)
    with pytest.raises(UserError, match=r"download failed \(.+\); run again: files that are whole"):
        fetch("someone/model")
    monkeypatch.setattr(Handler, "_content", whole)
    hub.requests.clear()
    directory = fetch("someone/model")
    cdn = [path for _, path, _ in hub.requests if path.startswith("/cdn/")]
    assert len(cdn) == 1
    for name in ENTRIES:
        assert (directory / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


# ---- one clear line


@pytest.mark.parametrize(
    ("model_id", "revision", "message"),
    [
        ("someone/none", None, "someone/none: no such model on the hub, and no such directory"),
        ("someone/model", "v9", r"someone/model \(revision v9\): no such branch, tag or commit"),
        ("a/b/c", None, "a/b/c: neither a directory nor a valid hub name"),
        ("someone/gated", None, "someone/gated: asks for a licence first: accept it on its page"),
        ("someone/hidden", None, r"no such model on the hub.* \(or HF_TOKEN\)"),
    ],
)
def test_what_the_hub_refuses_is_named(hub, tmp_path, model_id, revision, message):
    hub.add("someone/model", model(tmp_path / "files"))
    hub.add("someone/gated", tmp_path / "files", gated=True)
    hub.add("someone/hidden", tmp_path / "files", private=True)
    with pytest.raises(UserError, match=message) as raised:
        fetch(model_id, revision)
    assert "\n" not in str(raised.value)


def test_a_token_that_is_not_accepted_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.add("someone/model", model(tmp_path / "files"))
    with pytest.raises(UserError, match="the hub does not accept the token; set HF_TOKEN"):
        fetch("someone/model")


def test_offline_and_not_cached_is_named(hub, tmp_path, monkeypatch):
    hub.add("someone/model", model(tmp_path / "files"))
    fetch("someone/model", with_weights=False)
    offline(monkeypatch)
    for name in ("someone/model", "someone/other"):
        with pytest.raises(UserError, match="not whole in the local cache, and HF_HUB_OFFLINE"):
            fetch(name)
    assert fetch("someone/model", with_weights=False).is_dir()


def test_a_hub_that_cannot_be_reached_is_named(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not in the local cache and the hub cannot be reached"):
        fetch("someone/model")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "lacks model.safetensors on the hub; only safetensors"),
        ("pytorch_model.bin", b"x", "has pickled weights only, which are never fetched"),
        ("config.json", None, "has no config.json on the hub: not a transformers model"),
        ("config.json", b"{", r"someone/model/config.json: not JSON.*; delete .* to fetch it anew"),
        ("config.json", b'{"model_type": "bert"}', "model/config.json: model_type 'bert' is not"),
        ("model.safetensors.index.json", b"{}", "index.json: weight_map must .*; delete .* anew"),
    ],
)
def test_what_is_wrong_with_a_repository_is_named(hub, tmp_path, file, content, message):
    files = model(tmp_path / "files")
    if content is None or file.endswith(".bin"):
        (files / ("model.safetensors" if file.endswith(".bin") else file)).unlink()
    if content is not None:
        (files / file).write_bytes(content)
    hub.add("someone/model", files)
    with pytest.raises(UserError, match=message) as raised:
        fetch("someone/model")
    assert "\n" not in str(raised.value)
    assert not any(name.endswith(("safetensors", "bin")) for name in hub.fetched())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_the_cache_is_fetched_anew_once_deleted_as_told(hub, tmp_path, name):
    hub.add("someone/model", model(tmp_path / "files"))
    path = fetch("someone/model") / name
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"someone/model/{name}: .*; delete .* anew") as raised:
        fetch("someone/model")
    told = str(raised.value).rpartition("; delete ")[2].removesuffix(" to fetch it anew")
    Path(told).unlink()
    assert (fetch("someone/model") / name).read_bytes() == whole


# ---- runs that ship, with a model of the hub


@pytest.mark.parametrize("name, skipped", [("gsm", 7), ("prosqa", 14)])
@pytest.mark.slow
def test_runs_for_a_hub_model_train_its_last_stage_and_evaluate(
    twin, tmp_path, monkeypatch, name, skipped
):
    monkeypatch.chdir(REPOSITORY)
    base = model(tmp_path / "base")
    args = f"args/{name}_coconut_qwen.yaml"
    data = tmp_path / "data.json"
    write_items(data, 8)
    if name == "gsm":
        steps = ["<<48/2=24>>", "<<48+24=72>>"]
        item = {"question": "How many in 48 and half of it?", "steps": steps, "answer": "72"}
        data.write_text(json.dumps([item] * 8))
    common = [f"save_path={tmp_path}", f"val_path={data}", "max_new_tokens=3"]
    small = ["batch_size_training=4", "gradient_accumulation_steps=1", "report=False"]
    when = [f"resume={skipped}", f"num_epochs={skipped + 1}", f"train_path={data}"]
    config = load_config(args, [f"model_id={base}", *common, *small, *when])
    start(twin, config).train()
    steps = read_log(config, "train")
    assert [(step["stage"], step["lr"] > 0) for step in steps] == [(7, True)] * 2
    assert np.isfinite([step["loss"] for step in steps]).all()
    checkpoint = config.run_dir / f"epoch_{skipped + 1:02d}"
    load = f"load_model_path={checkpoint}"
    asked = load_config(f"args/{name}_coconut_qwen_eval.yaml", [load, *common])
    summary = start(twin, asked).evaluate_once().summary
    assert summary["n_latents"] == [6, 6] and summary["stage"] == 7
    # The rule is the checkpoint's own: thoughts at the scale of an embedding.
    # bfloat16 keeps 8 bits of each of a thought's coordinates, so about 2e-3 of their rms.
    np.testing.assert_allclose(summary["thoughts"]["scale"], 1, atol=0.02)


@pytest.mark.parametrize("name", ["gsm", "prosqa"])
def test_runs_for_a_hub_model_are_planned_without_network(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = write_items(tmp_path / "data.json", 4)
    keys = [f"train_path={data}", f"val_path={data}"]
    print_plan(load_config(f"args/{name}_coconut_qwen.yaml", keys), "mlx_coconut")
    out = capsys.readouterr().out
    assert "Qwen/Qwen2.5-0.5B: not downloaded yet" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    most = {row[1]: row[3].split("-")[-1] for row in rows if len(row) == 9 and row[1].isdigit()}
    assert most["0"] == "0" and most["7"] == "6"
