"""What is wrong with a run over a data set: one line with file, place and remedy, status 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from chat_tokenizers import CONTROL, TEMPLATES, chat_tokenizer
from tiny import chat_model, data_set_config

from coconut.commands.run import main
from coconut.errors import UserError
from coconut.tasks import questions as latro
from coconut.tasks.questions import chains


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def run(tmp_path, model) -> Path:
    """The YAML file of a LaTRO run that is right."""
    (tmp_path / "model").symlink_to(model)
    data_set_config(tmp_path, method="sft")  # writes the data
    values = {
        "method": "latro",
        "model_id": str(tmp_path / "model"),
        "dataset_name": "chains",
        "train_path": str(tmp_path / "train.jsonl"),
        "test_path": str(tmp_path / "test.jsonl"),
        "save_path": str(tmp_path / "runs"),
        "validation_items": 6,
        "response_length": 6,
        "rloo_k": 4,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    return tmp_path / "run.yaml"


def complaint(capsys, run: Path, *overrides: str, flags=("--check",)) -> str:
    """What the command says; it must be a line, with status 2 and without a file."""

    def no_backend(*_, **__):
        raise AssertionError("no model is to be built")

    before = sorted(run.parent.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main("mlx_coconut", no_backend, [str(run), *overrides, *flags])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert out == "" and sorted(run.parent.rglob("*")) == before
    return err.strip()


WHOLE = "docs/data_sets.md shows a whole data set"


def replace_line(path: Path, number: int, **fields) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | fields)
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["run", "check"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "dataset_name=chain",
            "{run}: dataset_name: no data set 'chain', did you mean chains?; docs/data_sets.md says"
            " how to add one",
        ),
        ("rloo_k=1", "{run}: rloo_k: must be at least 2: a single sample has no siblings"),
        (
            "rloo_k=5",
            "{run}: rloo_k: 4 rows x 12 micro-batches make 48 rollouts an update, which must be a"
            " multiple of rloo_k (5); change",
        ),
        (
            "rloo_k=2",
            "{dir}/train.jsonl: 18 prompts are fewer than the 24 of one update; lower",
        ),
        ("stop_seqs=['']", "{run}: stop_seqs: an empty text would end every rationale at once"),
        ("validation_items=24", "{dir}/train.jsonl: has 24 items: lower validation_items (24)"),
        ("train_path={dir}/test.jsonl", "{dir}/test.jsonl: is the test split; another file"),
        ("val_path={dir}/test.jsonl", "{dir}/test.jsonl: is the test split; another file"),
        ("val_path={dir}/train.jsonl", "{dir}/train.jsonl: is the train split too; name another"),
        ("test_path={dir}/none.jsonl", "{run}: test_path: no such file: {dir}/none.jsonl"),
        ("dataset_name=chains_8shot", "{run}: dataset_name: chains_8shot puts examples first"),
        ("pad_token='<nothing>'", "{dir}/model: pad_token: the tokenizer has no token '<nothing>'"),
        (
            "response_length=600",
            "{dir}/train.jsonl: item 0: question and answer take 45 of the model's 512 positions,"
            " which leaves 466 for a rationale of 600 tokens; lower response_length from 600 to",
        ),
    ],
)
def test_a_wrong_key(run, capsys, override, said, flags):
    places = {"run": run, "dir": run.parent}
    found = complaint(capsys, run, override.format(**places), flags=flags)
    assert found.startswith(said.format(**places))


@pytest.mark.parametrize("method", ["latro", "sft"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"groundtruth": " "},
            "line 3: field 'groundtruth' is empty; add one, or take the item out",
        ),
        ({"groundtruth": 4}, "line 3: field 'groundtruth' must be a string, got int"),
        (
            {"rationales": ""},
            "line 3: field 'rationales' is empty; write one, or leave it out of the item",
        ),
        (
            {"question": "1 \ud800"},
            ": item 2: question holds a lone surrogate, which no tokenizer can encode; repair it",
        ),
    ],
)
def test_a_broken_item_is_named_by_its_line(run, capsys, method, split, fields, said):
    path = run.parent / f"{split}.jsonl"
    replace_line(path, 2, **fields)
    overrides = [f"method={method}", *(["rloo_k=4"] if method == "latro" else [])]
    if method == "sft":
        values = json.loads(run.read_text())
        del values["rloo_k"]
        run.write_text(json.dumps(values))
        overrides = ["method=sft"]
    if split == "test":
        overrides += ["only_eval=True"]
    assert complaint(capsys, run, *overrides) in (f"{path} {said}", f"{path}{said}")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"question": "1", "groundtruth": " "}, "item 0: has no answer; add one, or take the item"),
        ({"question": "1"}, "item 0: groundtruth must be text, got NoneType"),
        ({"question": " ", "groundtruth": "1"}, "item 0: its question is empty; write one, or"),
        ("1 2 3", "item 0: must be a dict with question and groundtruth, got str"),
        (
            {"question": "1", "groundtruth": "1", "options": ["a", "\udfff"]},
            "item 0: options holds a lone surrogate, which no tokenizer can encode; repair it",
        ),
        (
            {"question": "1", "groundtruth": "1", "rationales": " "},
            "item 0: its rationale is empty; write one, or leave it out of the item",
        ),
        (
            {"question": "1", "groundtruth": "no number"},
            "item 0: its answer 'no number' cannot be read; correct it, or take the item out",
        ),
    ],
)
def test_what_a_users_own_reader_gives_is_checked(run, capsys, monkeypatch, item, said):
    good = [{"question": f"q{i}", "groundtruth": "1"} for i in range(30)]
    monkeypatch.setattr(chains, "read", lambda path: [item, *good])
    digit = lambda output, item: output[1:] if output[1:].isdigit() else ""  # noqa: E731
    monkeypatch.setattr(chains, "answer", digit)
    found = complaint(capsys, run, "only_eval=True")
    assert found.startswith(f"{run.parent / 'test.jsonl'}: {said}")


@pytest.mark.parametrize("method", ["latro", "sft"])
def test_a_validation_split_that_is_partly_trained_on(run, capsys, method):
    values = json.loads(run.read_text()) | {"method": method}
    if method == "sft":
        del values["rloo_k"]
    val = run.parent / "val.jsonl"
    run.write_text(json.dumps(values | {"val_path": str(val)}))
    lines = [(run.parent / f"{part}.jsonl").read_text().splitlines() for part in ("test", "train")]
    # Its rationale does not make a question another one.
    again = {k: v for k, v in json.loads(lines[1][7]).items() if k != "rationales"}
    val.write_text("\n".join([*lines[0][:3], json.dumps(again | {"rationales": "0 0"})]))
    assert complaint(capsys, run) == (
        f"{val}: 1 of its questions are trained on too, the first is item 3, which is item 7 of"
        f" {run.parent / 'train.jsonl'}; take them out of one of the two files"
    )
    values = json.loads(run.read_text()) | {"only_eval": True, "split": "validation"}
    run.write_text(json.dumps(values))
    main("mlx_coconut", None, [str(run), "--check"])  # trains on nothing


def test_a_prompt_without_a_token(run, capsys, monkeypatch):
    said = f"{run.parent / 'train.jsonl'}: item 2: its prompt is empty; correct prompt of the data"
    items = chains.read(run.parent / "train.jsonl")
    asks = lambda item, chat: "" if item == items[2] else item["question"]  # noqa: E731
    monkeypatch.setattr(chains, "prompt", asks)
    for template in ("always", "never"):
        assert complaint(capsys, run, f"chat_template={template}").startswith(said)


@pytest.mark.parametrize(
    ("n", "latents", "says", "left", "lower"),
    [(500, 0, "", 0, ""), (440, 60, " and 62 for its thoughts", 0, "lower latro_latents, ")],
)
def test_a_question_that_leaves_no_room_for_a_rationale(run, capsys, n, latents, says, left, lower):
    path = run.parent / "train.jsonl"
    replace_line(path, 4, question="1" * n)
    found = complaint(capsys, run, f"latro_latents={latents}", "validation_items=1")
    assert found.startswith(f"{path}: item 4: question and answer{says} take ")
    assert f"which leaves {left} for a rationale of 6 tokens; {lower}take the item out" in found


SUMS = """\
from coconut.tasks.files import parse_json, read_lines

FILES = {"train": "train.jsonl", "test": "test.jsonl"}
HOW = "ask for them"


def read(path):
    return [parse_json(line, where) for where, line in read_lines(path)]


def prompt(item, chat):
    return item["question"]


def response(item):
    return "=" + item["groundtruth"]


def answer(output, item):
    return output.rpartition("=")[2]
"""


@pytest.fixture
def own_set(run, monkeypatch) -> Path:
    """The file of a data set of the user's own, which `run` reads."""
    folder = run.parent / "own"
    folder.mkdir()
    (folder / "sums.py").write_text(SUMS)
    run.write_text(json.dumps(json.loads(run.read_text()) | {"dataset_name": "sums"}))
    monkeypatch.setattr(latro, "__path__", [*latro.__path__, str(folder)])
    # Written within a second of each other, so a cached one could pass for the next.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder / "sums.py"
    sys.modules.pop("coconut.tasks.questions.sums", None)
    vars(latro).pop("sums", None)


def test_a_data_set_of_ones_own(own_set, run, capsys):
    main("mlx_coconut", None, [str(run), "--check"])
    assert "checked: no model was built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def read(path):", "def read(path:", " line 7: cannot be imported (SyntaxError: "),
        (
            "import parse_json,",
            "import parse_jsn,",
            " line 1: cannot be imported (ImportError: cannot import name 'parse_jsn'",
        ),
        (
            "import parse_json,",
            "import *\nimport nowhere #",
            " line 2: cannot be imported (ModuleNotFoundError: No module named 'nowhere'); docs/",
        ),
        (
            "def prompt(item, chat):",
            "def prompt(item):",
            " line 11: prompt(item, chat) failed on '4 9 5 1' (TypeError: prompt() takes 1 ",
        ),
        (
            'return item["question"]',
            'item["question"]',
            " line 11: prompt(item, chat) must give text, got None for '4 9 5 1'; docs/",
        ),
        (
            'return "=" + item["groundtruth"]',
            'return int(item["groundtruth"])',
            " line 15: response(item) must give text, got int for '4 9 5 1'; docs/",
        ),
        (
            "return [parse_json(line, where) for",
            'return [parse_json(line, where)["asks"] for',
            " line 8: read(path) failed on '{dir}/train.jsonl' (KeyError: 'asks'); docs/",
        ),
        (
            "return [parse_json(line, where) for where, line in read_lines(path)]",
            "return read_lines(path)",
            " line 7: read(path) must give a list of items, got generator for '{dir}/train.jsonl'",
        ),
        (
            '{"train": "train.jsonl", "test": "test.jsonl"}',
            "5",
            ": FILES must be a dict, got int; docs/",
        ),
        (
            '"train": "train.jsonl"',
            '"trian": 5',
            ": lacks FILES['train']; FILES has no part 'trian', only train, validation, test;",
        ),
        ("def answer(", "answer = 5\n\n\ndef other(", ": answer must be a function, answer(output"),
        ("HOW =", "N_SHOTS, HOW = 2,", ": lacks SHOTS; docs/"),
    ],
)
def test_a_mistake_in_a_data_set_of_ones_own(own_set, run, capsys, old, new, said):
    assert old in SUMS
    own_set.write_text(SUMS.replace(old, new))
    found = complaint(capsys, run)
    assert found.startswith(f"{own_set}{said.format(dir=run.parent)}")
    assert found.endswith(f"; {WHOLE}")


def test_an_answer_that_fails_on_what_a_model_said_names_its_line(own_set):
    own_set.write_text(SUMS.replace('output.rpartition("=")[2]', "str(int(output))"))
    with pytest.raises(UserError) as raised:
        latro.load("sums").answer("no number", {"question": "1+1", "groundtruth": "2"})
    assert str(raised.value).startswith(
        f"{own_set} line 20: answer(output, item) failed on '1+1' (ValueError: invalid literal"
    )


def test_an_empty_file(run, capsys):
    (run.parent / "train.jsonl").write_text("\n")
    assert complaint(capsys, run) == f"{run.parent / 'train.jsonl'}: holds no items"


def test_a_file_that_is_not_there_says_how_to_get_it(run, capsys, monkeypatch):
    monkeypatch.setitem(chains.FILES, "train", "data/cache/missing.jsonl")
    values = json.loads(run.read_text())
    del values["train_path"]
    run.write_text(json.dumps(values))
    found = complaint(capsys, run)
    assert found == f"data/cache/missing.jsonl: no such file; {chains.HOW}"


def test_a_chat_template_that_is_wanted_and_missing(run, capsys, tmp_path, model):
    (run.parent / "model").unlink()
    plain = chat_model(tmp_path / "model", template=None)
    found = complaint(capsys, run, "chat_template=always")
    assert found == (
        f"{plain}: the tokenizer has no chat template; choose an instruction-tuned model, or set"
        " chat_template: auto"
    )


def test_a_tokenizer_without_a_padding_token_of_its_own(run, capsys, tmp_path):
    template = TEMPLATES["chatml"]
    control = tuple(t for t in CONTROL if t not in ("<pad>", "<|eot_id|>"))
    chat_tokenizer(tmp_path / "bare", template, eos="<|im_end|>", pad=None, control=control)
    found = complaint(capsys, run, f"tokenizer={tmp_path / 'bare'}")
    assert found == (
        f"{tmp_path / 'bare'}: the tokenizer has no padding token of its own, and eos must not"
        " stand in for it; name one that is never written (pad_token), or set stop_token: eos"
    )


def test_a_data_set_that_lacks_a_part(run, capsys, monkeypatch):
    monkeypatch.delattr(chains, "HOW")
    monkeypatch.delitem(chains.FILES, "test")
    found = complaint(capsys, run)
    assert found == f"{chains.__file__}: lacks HOW, FILES['test']; {WHOLE}"


def test_every_data_set_that_ships_is_whole():
    for name in latro.names():
        module = latro.load(name)
        assert module.HOW and set(module.FILES) <= {"train", "validation", "test"}
