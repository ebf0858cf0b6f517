"""YAML files of other programs, unchanged: the published ones, the MLX port's, the Qwen fork's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import gpt2_encoding
from tiny import random_gpt2

from coconut.commands.run import main
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.config.others import INSTEAD, NOTED
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError
from coconut.tasks import official

OTHERS = sorted((Path(__file__).parent / "others").glob("*.yaml"))
"""What these files say, key by key, written out by us."""
PLACEHOLDERS = ("YOUR_PATH_TO_SAVE_THE_MODEL", "PATH_TO_SAVE_THE_MODEL")
CHECKPOINTS = (
    *("YOUR_PATH_TO_SAVE_THE_MODEL/gsm-cot/checkpoint_22", "YOUR_PATH_TO_COCONUT_CHECKPOINT"),
    *("PATH_TO_COCONUT_CHECKPOINT", "PATH_TO_COT_CHECKPOINT"),
    *("outputs/gsm-cot-1/gsm-cot", "outputs/gsm-cot-qwen"),
)
ITEM = {"question": "Ada has 2 pens and gets 3. How many?", "steps": ["<<2+3=5>>"], "answer": "5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where such a run is checked: a checkpoint, a config.json of GPT-2, data but for ProsQA's."""
    folder = tmp_path_factory.mktemp("others")
    random_gpt2(folder / "checkpoint", 50257, 2, n_positions=64)
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        gpt2_encoding().save(folder / "checkpoint")
    shape = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 8, "n_layer": 1, "n_head": 1}
    (folder / "config.json").write_text(json.dumps(shape | {"n_positions": 64}))
    (folder / "data").mkdir()
    for name in ("gsm", "gsm_small", "prontoqa"):
        for part in ("train", "valid", "test"):
            (folder / f"data/{name}_{part}.json").write_text(json.dumps([ITEM] * 40))
    return folder


def filled_in(path: Path, folder: Path) -> str:
    """The file's text with its placeholders replaced, all else as it is."""
    text = path.read_text()
    for name in CHECKPOINTS:
        text = text.replace(f"load_model_path: {name}\n", "load_model_path: checkpoint\n")
    for name in PLACEHOLDERS:
        text = text.replace(f"save_path: {name}\n", f"save_path: {folder}/runs\n")
    return text.replace("PATH_TO_GPT2_CONFIG", "config.json")


@pytest.mark.parametrize("twin_name", ["mlx_coconut", "cuda_coconut"])
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_a_file_of_another_program_passes_the_check(
    path: Path, twin_name: str, folder: Path, monkeypatch, capsys
) -> None:
    gpt2_encoding()  # most of them mean GPT-2's
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("run.yaml").write_text(filled_in(path, folder))
    given = yaml.safe_load(Path("run.yaml").read_text())
    if given.get("system_prompt"):
        # What a file asks for and is not computed is refused by name; all else of it passes.
        with pytest.raises(SystemExit):
            main(twin_name, None, ["run.yaml", "--check"])
        said = "run.yaml: system_prompt: no prompt is put before questions; write it into the data"
        assert capsys.readouterr().err == said + "\n"
        del given["system_prompt"]
        Path("run.yaml").write_text(yaml.safe_dump(given))
    main(twin_name, None, ["run.yaml", "--check"])
    out = capsys.readouterr().out
    assert out.endswith("nothing was written\n") and not Path("runs").exists()
    config = load_config("run.yaml")
    # What the file says is what will be done.
    assert (config.c_thought, config.epochs_per_stage) == (
        given["c_thought"],
        given["epochs_per_stage"],
    )
    assert config.lr == given["lr"] and config.num_epochs == given["num_epochs"]
    assert config.max_size == given.get("max_size")
    assert config.feedback == given.get("replacement_method")
    fetched = "an official file, not there yet; `python data/download.py prosqa` fetches it"
    n_absent = sum("prosqa" in given[key] for key in ("train_path", "val_path"))
    assert out.count(fetched) == (n_absent if not given["only_eval"] else min(n_absent, 1))
    assert ("bf16_weight: weights stay float32" in out) == bool(given.get("bf16_weight"))


@pytest.fixture
def least(folder: Path, monkeypatch) -> dict:
    """The least a training run needs."""
    monkeypatch.chdir(folder)
    data = {"train_path": "data/gsm_train.json", "val_path": "data/gsm_valid.json"}
    return {"method": "coconut", "model_id": "gpt2", **data}


def problems_of(values: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(values)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    "theirs, value, ours, meant",
    [
        ("output_dir", "out", "save_path", "out"),
        ("lr_scheduler_type", "cosine", "lr_schedule", "cosine"),
        ("lr_scheduler_type", "constant_with_warmup", "lr_schedule", "constant"),
        ("warmup_steps", 30, "warmup_updates", 30),
        ("logging_steps", 7, "log_every", 7),
        ("save_total_limit", 2, "keep_checkpoints", 2),
        ("grad_clip", 1.0, "max_grad_norm", 1.0),
        ("replacement_method", "-1", "feedback", "-1"),
        ("replacement_method", 0.5, "feedback", "0.5"),
        ("report_to", "wandb", "report_to", "wandb"),
    ],
)
def test_a_name_of_another_program_stands_for_ours(least, theirs, value, ours, meant) -> None:
    assert getattr(check_config(least | {theirs: value}), ours) == meant
    if theirs != ours:
        (said,) = problems_of(least | {theirs: value, ours: meant})
        assert said == f"{theirs}: stands for {ours}, which is given too; drop one"


@pytest.mark.parametrize(
    "key, value, use",
    [
        ("warmup_ratio", 0.03, "set warmup_updates"),
        ("save_strategy", "steps", "save_every"),
        ("save_steps", 500, "save_every"),
        ("adam_beta1", 0.8, "0.9 here"),
        ("adam_epsilon", 1e-6, "1e-8 here"),
        ("optim", "paged_adamw_8bit", "AdamW is the optimizer"),
        ("fp16", True, "bf16: True"),
        ("resume_from_checkpoint", "outputs/checkpoint-500", "load_model_path"),
        ("resume_from_checkpoint", False, "another name"),
        ("push_to_hub", True, "`publish`"),
        ("deepspeed", "ds_config.json", "shard: True"),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "shard: True"),
        ("use_lora", True, "lora: {rank: 8}"),
        ("cot_epochs", 6, "method: cot"),
        ("bf16_weight", "yes", "weights stay float32"),
    ],
)
def test_what_is_no_key_is_answered_with_what_to_use(least, key, value, use) -> None:
    (said,) = problems_of(least | {key: value})
    assert said.startswith(f"{key}: ") and use in said and "did you mean" not in said


def test_what_says_nothing_new_is_taken(least) -> None:
    plain = check_config(least)
    for name, (accepted, _) in INSTEAD.items():
        for value in accepted:
            config = check_config(least | {name: value})
            assert config == plain and config.notes == ()
    for name in NOTED:
        assert check_config(least | {name: True}).notes == (f"{name}: {INSTEAD[name][1]}",)


def test_a_key_of_ours_comes_before_another_programs() -> None:
    # LaTRO counts updates by the name that elsewhere is answered.
    assert "save_steps" in INSTEAD and "save_steps" in LatroConfig.__dataclass_fields__
    assert not INSTEAD.keys() & RunConfig.__dataclass_fields__.keys()
    values = {"method": "latro", "dataset_name": "chains", "model_id": "gpt2", "save_steps": 5}
    assert check_config(values).save_steps == 5


def test_a_model_id_that_is_a_config_file_starts_from_random_weights(least, folder) -> None:
    config = check_config(least | {"model_id": "config.json"})
    assert (config.model_id, config.model_config_path) == (None, "config.json")
    assert config.tokenizer == "gpt2"  # its rows are those of GPT-2's tokens
    assert (
        check_config(least | {"model_id": "config.json", "tokenizer": "bytes"}).tokenizer == "bytes"
    )
    said = problems_of(least | {"model_id": "nowhere.json", "tokenizer": "gpt2"})
    assert said == ["model_config_path: no such file: nowhere.json"]


def test_the_tokenizer_is_only_guessed_where_the_rows_are_gpt2s(least, folder) -> None:
    shape = json.loads(Path("config.json").read_text())
    for change in ({"vocab_size": 257}, {"model_type": "qwen2"}):
        Path("other.json").write_text(json.dumps(shape | change))
        said = problems_of(least | {"model_id": None, "model_config_path": "other.json"})
        assert said == [
            "tokenizer: a model from model_config_path needs one (gpt2, prosqa or a directory)"
        ]
    Path("other.json").write_text("{")  # which is said where the model is opened
    assert problems_of(least | {"model_id": None, "model_config_path": "other.json"}) == said


# ---- official data files


def test_a_run_says_how_an_official_file_is_fetched_and_writes_nothing(twin, least, capsys) -> None:
    values = least | {"val_path": "data/prosqa_valid.json", "model_id": "config.json"}
    Path("run.yaml").write_text(json.dumps(values | {"save_path": "made", "model_id": "not/here"}))
    # Before a model is looked for.
    for absent, other in (("val_path", "train_path"), ("train_path", "val_path")):
        keys = [f"{absent}=data/prosqa_valid.json", f"{other}=data/gsm_valid.json"]
        with pytest.raises(SystemExit):
            main(twin.__name__, twin.run.make_backend, ["run.yaml", *keys])
        assert capsys.readouterr().err == (
            "data/prosqa_valid.json: no such file; `python data/download.py prosqa` fetches it\n"
        )
    assert not Path("made").exists()


def test_another_file_by_an_official_name_is_noted(least, tmp_path) -> None:
    path = tmp_path / "prosqa_test.json"
    path.write_text(json.dumps([ITEM]))
    (note,) = check_config(least | {"val_path": str(path)}).notes
    assert note.startswith(f"val_path: {path}: bears an official file's name, but is another")
    made = tmp_path / "prosqa_made_test.json"
    made.write_text(json.dumps([ITEM]))
    assert check_config(least | {"val_path": str(made)}).notes == ()


def test_what_is_generated_never_takes_an_official_name(least) -> None:
    values = least | {"train_path": "data/prosqa_train.json", "generate": {"items": 5}}
    (said,) = problems_of(values)
    assert said == "train_path: is an official file's name; give what generate makes another"


def test_no_shipped_file_or_run_bears_an_official_name() -> None:
    root = Path(__file__).parents[2]
    tracked = [*root.glob("args/**/*.yaml"), *root.glob("docs/*.md"), root / "README.md"]
    for path in tracked:
        for line in path.read_text().splitlines():
            if any(f"{name}" in line for name in official.PROSQA):
                assert "official" in line or line.startswith("#"), f"{path}: {line}"
