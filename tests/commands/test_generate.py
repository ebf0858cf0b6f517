"""Asking a checkpoint: by which name it is found, mlx_lm's option names, what it cannot know."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import CHOSEN, load_twin
from tiny import REPOSITORY, random_gpt2, run_config, start

from coconut.checkpoints.named import found_model
from coconut.commands.face import Face, generate
from coconut.commands.generate import main
from coconut.errors import UserError
from coconut.files import here_or_shipped, shipped
from coconut.text.tiktoken import bytes_encoding

PROSQA = REPOSITORY / "data/checkpoints/prosqa"
QUESTION = (
    "Every lempus is a jompus. Tom is a lempus. Every rempus is a zumpus. Sam is a rempus."
    " Is Tom a jompus or zumpus?"
)
RIGHT = "### Tom is a jompus."


def ask(twin, *argv: object) -> None:
    main(twin.__name__, twin.run.make_backend, [str(arg) for arg in argv])


def refusal(capsys, twin, *argv: object) -> str:
    with pytest.raises(SystemExit) as stop:
        ask(twin, *argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_names_of_mlx_lm_do_the_same_as_ours(twin, capsys) -> None:
    ask(twin, *("--model", PROSQA, "--question", QUESTION, "--max-new-tokens", 3))
    ours = capsys.readouterr()
    ask(twin, *("--model", "prosqa", "--prompt", QUESTION, "--max-tokens", 3, "--temp", 0))
    assert capsys.readouterr() == ours
    assert ours.out.startswith("### ") and ours.err == ""


def test_a_shipped_model_answers_by_its_name(twin, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    ask(twin, "--model", "prosqa", "--prompt", QUESTION)
    assert capsys.readouterr() == (f"{RIGHT}\n", "")


@pytest.mark.parametrize("question", ["What is 1 + 1?", QUESTION.replace("lempus", "kettle")])
def test_a_question_outside_of_what_it_knows_is_answered_with_a_warning(
    twin, capsys, question
) -> None:
    ask(twin, "--model", "prosqa", "--prompt", QUESTION, "--prompt", question, "--json")
    out, err = capsys.readouterr()
    assert [json.loads(line)["question"] for line in out.splitlines()] == [QUESTION, question]
    assert err.count("\n") == 1 and err.startswith("warning: question 1: ")
    assert ("kettle" in err) == ("kettle" in question)


def test_a_directory_comes_before_a_shipped_model_and_that_before_the_hub(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found_model("prosqa") == PROSQA and found_model("hops") == PROSQA.parent / "hops"
    shutil.copytree(PROSQA.parent / "hops", "prosqa")
    assert found_model("prosqa") == Path("prosqa")
    with pytest.raises(UserError, match="prosqa2"):
        found_model("prosqa2")


def test_a_file_here_comes_before_one_that_ships(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert here_or_shipped("data/hops_valid.json") == str(shipped("data/hops_valid.json"))
    assert here_or_shipped("data/nothing.json") == "data/nothing.json"
    Path("data").mkdir()
    Path("data/hops_valid.json").write_text("[]")
    assert here_or_shipped("data/hops_valid.json") == "data/hops_valid.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, Path]:
    """(a base, a checkpoint with an adapter trained beside it)."""
    folder = tmp_path_factory.mktemp("adapter")
    twin = load_twin(CHOSEN[0])
    start(twin, run_config(folder, name="base", method="cot", num_epochs=1)).train()
    base = folder / "runs/base/epoch_01"
    keys = {"model_id": str(base), "lora": {"rank": 2}, "lr": 1e-2}
    config = run_config(folder, model_config_path=None, tokenizer=None, num_epochs=1, **keys)
    start(twin, config).train()
    return base, config.run_dir / "epoch_01"


def test_an_adapter_beside_its_base_answers_as_its_checkpoint_does(
    twin, adapter, tmp_path, capsys
) -> None:
    base, trained = adapter
    rest = ("--prompt", QUESTION, "--max-tokens", 8, "--json")
    ask(twin, "--model", trained, *rest)
    alone = capsys.readouterr().out
    # The base may have gone elsewhere since.
    moved = shutil.copytree(base, tmp_path / "moved")
    ask(twin, "--model", moved, "--adapter-path", trained, *rest)
    assert capsys.readouterr().out == alone
    said = refusal(capsys, twin, "--model", PROSQA, "--adapter-path", trained, *rest)
    assert "was trained beside other weights" in said and said.count("\n") == 1
    said = refusal(capsys, twin, "--model", base, "--adapter-path", base, *rest)
    assert "adapter_config.json" in said and said.count("\n") == 1
    both = ("--model", base, "--base", base, "--adapter-path", trained)
    assert "--base" in refusal(capsys, twin, *both, *rest)


def test_one_long_question_takes_no_room_from_the_others(twin, tmp_path, capsys) -> None:
    random_gpt2(tmp_path / "model", 257, 16, n_positions=60, std=0.6)
    bytes_encoding().save(tmp_path / "model")
    asked = ("--model", tmp_path / "model", "--max-tokens", 20, "--json")
    ask(twin, *asked, "--prompt", "2+2=")
    alone = capsys.readouterr()
    assert alone.err == "" and not json.loads(alone.out)["cut"]
    ask(twin, *asked, "--prompt", "1+" * 24 + "1=", "--prompt", "2+2=")
    out, err = capsys.readouterr()
    long, short = (json.loads(line) for line in out.splitlines())
    assert short == json.loads(alone.out) and long["cut"]
    assert err == "warning: answer cut where the model's 60 positions end\n"
    lens = Face(twin.__name__, twin.run.make_backend).load(tmp_path / "model")
    with pytest.warns(UserWarning, match="answers cut where the model's 60 positions end: 1"):
        generate(lens, ["1+" * 24 + "1=", "2+2="], max_new_tokens=20)
    said = refusal(capsys, twin, *asked, "--prompt", "2+2=", "--prompt", "1+" * 30)
    assert "number 1: 61 tokens, but the model has 60 positions" in said


def test_questions_awaited_at_a_terminal_are_asked_for(twin, tmp_path, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("\n"))
    said = refusal(capsys, twin, "--model", tmp_path)
    assert said.startswith("questions, one a line; Ctrl-D ends them\ncommand line: no question;")
