"""Published and own YAML files, overrides, and what the user is told about wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError

PUBLISHED = """
project: coconut
save_path: {folder}/runs
name: {name}

only_eval: {only_eval}

coconut: {coconut}
cot: {cot}
no_thoughts: False
no_cot: False

c_thought: {c_thought}
epochs_per_stage: {epochs_per_stage}
max_latent_stage: {max_latent_stage}
pad_latent_to_max: True

save_only_improve: {cot}
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: {load_model_path}
seed: 0
resume: {resume}
bf16: False
train_path: {folder}/train.json
val_path: {folder}/{val}.json
reset_optimizer: {coconut}
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: {num_epochs}
lr: !!float "1e-4"
weight_decay: 0.01
"""

GSM_COT = dict(
    name="gsm-cot",
    only_eval=False,
    coconut=False,
    cot=True,
    c_thought=0,
    epochs_per_stage=1,
    max_latent_stage=0,
    load_model_path='"None"',
    resume=0,
    num_epochs=25,
    val="gsm_valid",
)
GSM_COCONUT = GSM_COT | dict(
    name="gsm-coconut",
    coconut=True,
    cot=False,
    c_thought=2,
    epochs_per_stage=3,
    max_latent_stage=3,
    load_model_path="{folder}/cot",
    resume=3,
)
GSM_EVAL = GSM_COCONUT | dict(name="gsm-eval", only_eval=True, resume=12, val="gsm_test")
PROSQA = GSM_COCONUT | dict(
    name="prosqa",
    c_thought=1,
    epochs_per_stage=5,
    max_latent_stage=6,
    load_model_path="None",
    resume=0,
    num_epochs=50,
    val="prosqa_valid",
)
RUNS = {"gsm_cot": GSM_COT, "gsm": GSM_COCONUT, "gsm_eval": GSM_EVAL, "prosqa": PROSQA}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the published runs name, empty."""
    for name in ("train.json", "gsm_valid.json", "gsm_test.json", "prosqa_valid.json"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "cot").mkdir()
    return tmp_path


@pytest.fixture
def valid(folder: Path) -> dict:
    """The least a training run needs."""
    return {
        "method": "coconut",
        "model_id": "gpt2",
        "train_path": str(folder / "train.json"),
        "val_path": str(folder / "gsm_valid.json"),
        "save_path": str(folder / "runs"),
    }


def published(folder: Path, run: dict) -> Path:
    path = folder / "run.yaml"
    text = PUBLISHED.format(folder="{folder}", **run)
    path.write_text(text.replace("{folder}", str(folder)))
    return path


def problems_of(values: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(values)
    return list(caught.value.problems)


# ---- published files


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_published_files_load_unchanged(folder: Path, run: dict) -> None:
    config = load_config(published(folder, run))

    assert config.method == ("cot" if run["cot"] else "coconut")
    assert (config.coconut, config.cot) == (run["coconut"], run["cot"])
    assert not config.no_cot and not config.no_thoughts
    assert config.lr == 1e-4 and config.weight_decay == 0.01
    assert config.c_thought == run["c_thought"] and config.resume == run["resume"]
    assert config.reset_optimizer == ("epoch" if run["coconut"] else "never")
    cot = str(folder / "cot")
    assert config.load_model_path == (cot if "cot" in run["load_model_path"] else None)
    assert config.new_tokens == (64 if "gsm" in run["val"] else 128)


def test_every_published_key_exists() -> None:
    keys = {f.name for f in dataclasses.fields(RunConfig)}
    assert set(yaml.safe_load(PUBLISHED.replace("{", "").replace("}", ""))) <= keys
    assert "model_config_path" in keys


@pytest.mark.parametrize("switch", ["coconut", "cot", "no_thoughts", "no_cot"])
def test_each_published_switch_selects_its_method(valid: dict, switch: str) -> None:
    del valid["method"]
    config = check_config(valid | {switch: True})
    assert config.method == switch
    assert [getattr(config, s) for s in ("coconut", "cot", "no_thoughts", "no_cot")].count(
        True
    ) == 1


def test_the_text_none_means_none_where_none_is_allowed(valid: dict) -> None:
    assert check_config(valid | {"load_model_path": "None"}).load_model_path is None
    assert problems_of(valid | {"seed": "None"}) == ["seed: expected a whole number, got 'None'"]
    assert problems_of(valid | {"project": "None"}) == ["project: needs a value"]
    assert problems_of(valid | {"lr": None}) == ["lr: needs a value"]


def test_numbers_may_be_written_the_yaml_1_1_way(valid: dict) -> None:
    # Without a dot YAML 1.1 reads 1e-4 as text.
    config = check_config(valid | yaml.safe_load("{lr: 1e-4, num_epochs: 3.0}"))
    assert config.lr == 1e-4
    assert config.num_epochs == 3 and type(config.num_epochs) is int


@pytest.mark.parametrize("value, meaning", [(True, "epoch"), (False, "never"), ("stage", "stage")])
def test_reset_optimizer_keeps_its_published_booleans(
    valid: dict, value: bool | str, meaning: str
) -> None:
    assert check_config(valid | {"reset_optimizer": value}).reset_optimizer == meaning


# ---- what is wrong is said at once


def test_all_problems_are_listed_at_once_with_the_file(folder: Path) -> None:
    path = folder / "bad.yaml"
    path.write_text("c_thougt: 2\nlr: 1e-4x\nmethod: coconut\nval_path: nowhere.json\n")
    with pytest.raises(UserError) as caught:
        load_config(path, ["seed=-1", "nonsense"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 7 problems"
    for expected in (
        "c_thougt: unknown key, did you mean c_thought?",
        "lr: expected a number, got '1e-4x'",
        "seed: must be at least 0, got -1",
        "'nonsense': overrides are written key=value",
        "val_path: no such file: nowhere.json",
        "model_id: name a model, or give model_config_path or load_model_path",
        "train_path: missing (or describe the data to make under generate)",
    ):
        assert "  " + expected in lines


@pytest.mark.parametrize(
    "key, guess",
    [("epochs_per_stag", "epochs_per_stage"), ("studying", None), (3, None), ("batch", None)],
)
def test_unknown_key_suggests_the_nearest(valid: dict, key: object, guess: str | None) -> None:
    advice = f"did you mean {guess}?" if guess else "docs/keys.md lists them"
    assert problems_of(valid | {key: 1}) == [f"{key}: unknown key, {advice}"]


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("cot", "yes", "expected True or False, got 'yes'"),
        ("debug", 1, "expected True or False, got 1"),
        ("seed", 1.5, "expected a whole number, got 1.5"),
        ("seed", True, "expected a whole number, got True"),
        ("seed", 10**300, "too large: 1" + "0" * 59 + "..."),
        ("lr", float("inf"), "expected a finite number, got inf"),
        ("lr", True, "expected a number, got True"),
        ("lr", -0.1, "must be at least 0, got -0.1"),
        ("lr", "x" * 500, f"expected a number, got '{'x' * 59}..."),
        ("project", ["a"], "expected text, got ['a']"),
        ("name", False, "expected text; YAML takes off, no or false for False: write it in quotes"),
        ("project", "a\0b", r"holds characters that cannot be printed: 'a\x00b'"),
        ("project", "a\nb", r"holds characters that cannot be printed: 'a\nb'"),
        ("generate", [1], "expected `key: value` lines, got [1]"),
        ("epochs_per_stage", 0, "must be at least 1, got 0"),
        ("lr_schedule", "cosin", "expected one of constant, linear, cosine, got 'cosin'; did"),
        ("reset_optimizer", 1, "expected text"),
    ],
)
def test_ill_typed_values_are_named(valid: dict, key: str, value: object, complaint: str) -> None:
    if key == "reset_optimizer":
        complaint = "expected one of never, stage, epoch, got '1'"
    assert problems_of(valid | {key: value})[0].startswith(f"{key}: {complaint}")


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"method": None}, "method: exactly one of coconut, cot, no_thoughts, no_cot must be True"),
        ({"method": None, "cot": True, "coconut": True}, "method: exactly one of"),
        ({"cot": True}, "method: coconut contradicts cot: True; drop one of them"),
        ({"c_thought": 0}, "c_thought: coconut needs at least 1 latent per step"),
        ({"method": "cot", "uniform_prob": 0.3}, "uniform_prob: draws stages, which cot does not"),
        ({"uniform_prob": 1.5}, "uniform_prob: a probability, at most 1, got 1.5"),
        ({"method": "icot", "stage_mixing": "item"}, "stage_mixing: mixes stages, which icot"),
        ({"uniform_prob": 0.3, "stage_mixing": "item"}, "stage_mixing: cannot be combined with"),
        ({"n_latents": 2}, "n_latents: forces an evaluation only"),
        ({"method": "cot", "n_latents": 2, "only_eval": True}, "n_latents: cot has no latents"),
        ({"stage": 2}, "stage: selects an evaluation's stage"),
        ({"only_eval": True, "model_id": None}, "load_model_path: only_eval needs the checkpoint"),
        (
            {"model_id": None, "model_revision": "v1"},
            "model_revision: chooses a version of a model",
        ),
        ({"resume": 5, "num_epochs": 5}, "resume: 5 skips all 5 epochs, nothing is left to train"),
        ({"model_id": None}, "model_id: name a model"),
        ({"model_id": None, "model_config_path": __file__}, "tokenizer: a model from model_config"),
        ({"model_config_path": __file__, "tokenizer": "gpt2"}, "model_config_path: starts from"),
        ({"val_path": None}, "val_path: missing"),
        ({"train_path": None}, "train_path: missing (or describe the data to make"),
        ({"name": "a/b"}, "name: must be a plain directory name, got 'a/b'"),
        ({"name": ".."}, "name: must be a plain directory name, got '..'"),
        ({"save_path": ""}, "save_path: must not be empty"),
        ({"train_path": "prosqa_made.json"}, "train_path: no such file: prosqa_made.json (data/"),
        ({"load_model_path": "nowhere"}, "load_model_path: no such checkpoint: nowhere"),
        ({"val_path": "x" * 5000}, "val_path: no such file: xxx"),
        ({"name": "é" * 101}, "name: longer than 200 bytes: 'éé"),
        ({"save_path": "x" * 300}, "save_path: 'xxx"),
        ({"save_path": __file__}, "save_path: "),
    ],
)
def test_impossible_combinations_are_refused(valid: dict, changes: dict, complaint: str) -> None:
    assert any(p.startswith(complaint) for p in problems_of(valid | changes))


@pytest.mark.parametrize(
    "lora, complaint",
    [
        ({"rnak": 4}, "lora.rnak: unknown key, did you mean rank?"),
        ({"rank": 0}, "lora.rank: must be at least 1, got 0"),
        ({"type": "qlora"}, "lora.type: expected one of lora, dora, got 'qlora'"),
        ({"scale": 0}, "lora.scale: must be above 0"),
        ({"alpha": 16, "scale": 3.0}, "lora.alpha: sets scale to alpha / rank"),
        ({"dropout": 1.0}, "lora.dropout: must be below 1, got 1.0"),
        ({"targets": []}, "lora.targets: the list is empty"),
        ({"targets": [1.5, None]}, "lora.targets: expected text, got None"),
        ({"layers": 0}, "lora.layers: must be at least 1"),
        ({"quantize": 3}, "lora.quantize: expected 4 or 8 bits, got 3"),
        ({"quantize": 4, "group_size": 48}, "lora.group_size: expected 32, 64 or 128, got 48"),
        ({"group_size": 32}, "lora.group_size: belongs to quantize, which is not set"),
    ],
)
def test_wrong_settings_of_an_adapter_are_named(valid: dict, lora: dict, complaint: str) -> None:
    assert any(p.startswith(complaint) for p in problems_of(valid | {"lora": lora}))


def test_an_adapter_beside_random_weights_is_refused(valid: dict) -> None:
    changes = {"model_id": None, "model_config_path": __file__, "tokenizer": "gpt2"}
    found = problems_of(valid | changes | {"lora": {"rank": 4}})
    assert found == [
        "lora.type: needs trained weights under it; give model_id or load_model_path, not"
        " model_config_path"
    ]


def test_alpha_is_another_way_to_say_scale(valid: dict) -> None:
    config = check_config(valid | {"lora": {"rank": 4, "alpha": 8, "targets": "c_attn"}})
    assert config.adapter == Lora(rank=4, scale=2.0, targets=["c_attn"])
    assert check_config(valid).adapter is None


def test_a_file_in_place_of_the_run_directory_is_refused(valid: dict, folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "run").write_text("")
    assert problems_of(valid) == [
        f"name: {folder}/runs/run is a file; the run needs a directory there"
    ]


NESTED_ALIASES = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


def test_aliases_that_stand_for_little_are_read(tmp_path: Path, valid: dict) -> None:
    more = "generate: {items: &n 4}\nnum_epochs: *n\nlora: &l {rank: 2}\n"
    (path := tmp_path / "run.yaml").write_text(yaml.safe_dump(valid) + more)
    assert load_config(path).num_epochs == 4


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("a: [1", "line 1: not valid YAML"),
        ("lr: !!bool x", "not valid YAML: 'x'"),  # KeyError inside the library
        ("lr: !!int ''", "not valid YAML"),  # IndexError
        ("lr: !!timestamp x", "not valid YAML"),  # AttributeError
        ("seed: 2020-13-01", "not valid YAML: month must be in 1..12"),
        ("seed: " + "1" * 5000, "not valid YAML"),
        ("- a\n- b", "expected `key: value` lines"),
        ("just text", "expected `key: value` lines"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("[" * 900 + "]" * 900, "not valid YAML"),
        # Billions of words in some lines; written out to be cut, their message would never come.
        (NESTED_ALIASES, "not valid YAML: more than 100,000 values, aliases written out"),
        ("lr: &a [*a]", "not valid YAML: more than 100,000 values, aliases written out"),
    ],
)
def test_broken_yaml_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and complaint in message and "\n" not in message


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; the runs that ship lie in args/"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        load_config(tmp_path / "binary.yaml")


# ---- overrides


def test_overrides_replace_single_keys(folder: Path) -> None:
    config = load_config(published(folder, PROSQA), ["lr=1e-3", "name=other", "bf16=true"])
    assert (config.lr, config.name, config.bf16) == (1e-3, "other", True)


def test_an_override_replaces_what_the_file_says_under_another_name(folder: Path) -> None:
    path = published(folder, PROSQA)  # name: ..., coconut: True
    config = load_config(path, ["run_name=other", "learning_rate=0.5", "method=no_cot"])
    assert (config.name, config.lr, config.method) == ("other", 0.5, "no_cot")
    assert load_config(path, ["run_name=one", "name=two"]).name == "two"
    with pytest.raises(UserError, match="contradicts"):
        load_config(path, ["method=no_cot", "cot=True"])


def test_a_key_that_stands_there_twice_is_refused(folder: Path) -> None:
    path = published(folder, PROSQA)
    path.write_text(path.read_text() + "generate: {items: 1, items: 2}\nseed: 0\nseed: 1\n")
    with pytest.raises(
        UserError, match=r"line \d+: not valid YAML: '(seed|items)' stands there twice"
    ):
        load_config(path)


def test_a_complaint_names_keys_as_they_were_given(valid: dict) -> None:
    keys = {"method": "latro", "dataset_name": "gsm8k", "per_device_train_batch_size": 3}
    whole = {k: v for k, v in valid.items() if k not in ("coconut", "batch_size_training")}
    with pytest.raises(UserError, match="change per_device_train_batch_size or"):
        check_config(whole | keys | {"rloo_k": 5})


def test_a_value_that_cannot_be_read_is_one_line(valid: dict) -> None:
    # Of 0 rows no update is made up, so nothing is said of what they would make together.
    keys = {"method": "latro", "dataset_name": "gsm8k", "rloo_k": 3}
    whole = {k: v for k, v in valid.items() if k not in ("coconut", "train_path", "val_path")}
    with pytest.raises(UserError) as caught:
        check_config(whole | keys | {"batch_size_training": 0, "lr": "x"})
    assert [line.split(":")[0] for line in caught.value.problems] == ["batch_size_training", "lr"]


def test_an_override_may_hold_an_equals_sign_and_may_be_broken(folder: Path) -> None:
    path = published(folder, PROSQA)
    assert load_config(path, ["name=a=b"]).name == "a=b"
    with pytest.raises(UserError) as caught:
        load_config(path, ["name=[", "lr=!!bool x", "=3"])
    assert list(caught.value.problems) == [
        "name: cannot read '[' as a YAML value; quote it",
        "lr: cannot read '!!bool x' as a YAML value; quote it",
        "'=3': overrides are written key=value",
    ]


def test_a_dotted_override_changes_one_key_of_a_group(folder: Path) -> None:
    path = published(folder, PROSQA)
    path.write_text(path.read_text() + "generate: {items: 10, swapped: 0.5}\n")
    config = load_config(path, ["generate.items=20", "generate.fresh=true", "generate.nodes=12"])
    assert config.generate == {"items": 20, "swapped": 0.5, "fresh": True, "nodes": 12}


def test_a_dotted_override_of_a_plain_key_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="lr: expected a number"):
        load_config(published(folder, PROSQA), ["lr.x=1"])


# ---- generate


def test_generated_data_need_no_training_file(valid: dict) -> None:
    del valid["train_path"]
    assert check_config(valid | {"generate": {"items": 5}}).generate == {"items": 5}


def test_all_problems_of_generate_are_listed_with_the_others(valid: dict) -> None:
    generate = {"item": 5, "fresh": "yes", "seed": -1, "nodes": 2.5, "swapped": 2, "zzz": 1}
    first, second, unknown, *rest = problems_of(valid | {"generate": generate, "lr": "x"})
    assert first == "lr: expected a number, got 'x'"
    assert second == "generate.item: unknown key, did you mean items?"
    assert unknown.startswith("generate.zzz: unknown key, known: equal_depth, fresh, items, ")
    assert rest == [
        "generate.fresh: expected True or False, got 'yes'",
        "generate.seed: must be at least 0, got -1",
        "generate.items: missing; how many items to make",
        "generate.nodes: expected a whole number, got 2.5",
        "generate.swapped: expected a share from 0 to 1, got 2",
    ]


@pytest.mark.parametrize("items", [0, -1, "many", None, 1.5, True, 10**300])
def test_the_number_of_items_must_be_one(valid: dict, items: object) -> None:
    (problem,) = problems_of(valid | {"generate": {"items": items}})
    assert problem.startswith("generate.items: ")


def test_a_generator_option_may_be_any_value_without_a_traceback(valid: dict) -> None:
    for nodes in (10**5000, [8, 10**5000]):
        problems = problems_of(valid | {"generate": {"items": 1, "fresh": True, "nodes": nodes}})
        assert problems == ["generate.nodes: too large: a int too large to show"]


def test_a_list_under_generate_holds_a_value_an_epoch(valid: dict) -> None:
    fresh = {"items": 5, "fresh": True}
    good = fresh | {"nodes": [8, 12], "steps": ["walk", "walk", "thoughts"]}
    assert check_config(valid | {"generate": good}).generate == good
    bad = fresh | {"nodes": [8, 5, 5], "steps": ["path", "talk"]}
    assert problems_of(valid | {"generate": bad}) == [
        "generate.steps: expected path, explore, walk, thoughts, got 'talk'",
        "generate.nodes: 3 hops need at least 6, got 5",
    ]
    assert problems_of(valid | {"generate": fresh | {"steps": []}}) == [
        "generate.steps: the list is empty"
    ]
    assert problems_of(valid | {"generate": {"items": 5, "nodes": [8, 12]}}) == [
        "generate.nodes: a list, a value an epoch, needs fresh: True"
    ]


# ---- the resolved file


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_resolved_file_loads_to_the_same_run(folder: Path, run: dict) -> None:
    config = load_config(published(folder, run), ["generate={items: 3, nodes: 12}"])
    (folder / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(folder / "resolved.yaml") == config


def test_the_resolved_file_can_be_overridden_to_another_method(folder: Path) -> None:
    config = load_config(published(folder, PROSQA))
    (folder / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(folder / "resolved.yaml", ["method=cot"]).method == "cot"


def test_a_changed_default_of_one_run_is_not_seen_by_another() -> None:
    RunConfig().generate["items"] = 1
    assert RunConfig().generate == {}
