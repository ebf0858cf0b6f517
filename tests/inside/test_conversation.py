"""A conversation: what is answered, what is said of wrong text, and how it ends."""

from __future__ import annotations

import builtins
import io
import sys

import pytest
import rich.console
from lenses import QUESTION, write_checkpoint

from coconut.batches.decoding import Decoding
from coconut.inside.chat import PROMPT, Chat, main
from coconut.inside.lens import Lens
from coconut.text.tiktoken import prosqa_encoding

ANSWER = "### Tom is a zumpus."


class Speaker:
    """A back end that says one text, token by token, whatever it is asked."""

    name = model_type = device = dtype = "fake"
    note, n_params, n_positions = "", 1, 200

    def __init__(self, text: str = ANSWER):
        tokenizer = prosqa_encoding().with_latents()
        self.tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        self.n_latents: list[int] = []

    def generate(self, batch, decoding: Decoding, replaced=None):
        self.n_latents.append(int(batch.is_latent.sum()))
        for n in range(1, len(self.tokens) + 1):
            if decoding.ends(self.tokens[:n]):
                break
        return [self.tokens[:n]]


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "model", "statements")


def chat_of(directory, speaker=None, **options) -> tuple[Chat, io.StringIO]:
    stream = io.StringIO()
    lens = Lens(directory, lambda config, source: speaker or Speaker())
    return Chat(lens, rich.console.Console(file=stream, **options), 20), stream


def test_an_answer_streams_without_its_sign(directory):
    chat, stream = chat_of(directory)
    pieces = []
    say = chat.say
    chat.say = lambda text, *a, **k: pieces.append(text) or say(text, *a, **k)
    assert chat.answer(QUESTION)
    assert stream.getvalue() == "Tom is a zumpus.\n"
    assert [piece for piece in pieces if piece] == ["Tom", " is a zumpus."]


def test_half_a_sign_or_character_is_held_until_it_is_whole(directory):
    speaker = Speaker()
    # A token a byte, as for any text that the encoding has no pieces for.
    speaker.tokens = [*"#1 ü\n### ja".encode(), speaker.tokens[-1]]
    chat, stream = chat_of(directory, speaker)
    pieces = []
    say = chat.say
    chat.say = lambda text, *a, **k: pieces.append(text) or say(text, *a, **k)
    chat.answer(QUESTION)
    assert stream.getvalue() == "#1 ü\nja\n"
    assert pieces == ["#1", " ", "ü", "\n", "j", "a", ""]


def test_a_chain_stands_before_its_answer(directory):
    chat, stream = chat_of(directory, Speaker("Tom is a wumpus.\n### Tom is a wumpus."))
    chat.answer(QUESTION)
    assert stream.getvalue() == "Tom is a wumpus.\nTom is a wumpus.\n"


def test_thoughts_can_be_set_and_the_question_asked_again(directory):
    speaker = Speaker()
    chat, stream = chat_of(directory, speaker)
    for line in (QUESTION, "/k 1", "/again", "/k 0", "/again", "/k own", "/again", "/k"):
        assert chat.answer(line)
    assert speaker.n_latents == [3, 1, 0, 3]
    assert stream.getvalue().endswith("3 thoughts\n")


def test_an_example_is_shown_asked_and_judged(directory):
    speaker = Speaker()
    chat, stream = chat_of(directory, speaker)
    assert chat.answer("/example 8")
    question, answer, verdict = stream.getvalue().splitlines()
    assert question.endswith("?") and answer == "Tom is a zumpus."
    assert verdict.startswith("wrong: ") and chat.last == question


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "not a ProsQA question"),
        ("Every cat is a dog. Tom is a cat. Is Tom a dog or cat?", "not trained on: cat, dog;"),
        ("Tom is a wumpus. " * 300 + "Is Tom a wumpus or lempus?", "positions"),
        ("/thoughs", "did you mean /thoughts?"),
        ("/k many", "a number of thoughts, got 'many'"),
        ("/again", "no question yet"),
        ("/example two", "a number of raw nodes"),
        ("/example 99", "expected 4 to 40"),
        ("\udcff", "lone surrogate"),
    ],
)
def test_wrong_text_is_one_line_and_the_talk_goes_on(directory, capsys, line, message):
    chat, stream = chat_of(directory)
    assert chat.answer(line)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and stream.getvalue() == ""
    assert chat.answer(QUESTION) and stream.getvalue() == "Tom is a zumpus.\n"


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_quit_ends_it(directory, line):
    assert chat_of(directory)[0].answer(line) is False


def terminal(monkeypatch, lines: list) -> list[str]:
    """Types these lines, or raises them, at the prompts that it returns."""
    prompts: list[str] = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return prompts


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt(), "/quit"])
def test_a_terminal_is_left_cleanly(directory, monkeypatch, capsys, end):
    prompts = terminal(monkeypatch, ["", QUESTION, end])
    main("fake", lambda *_: Speaker(), ["--model", str(directory)])
    assert prompts == [PROMPT] * 3
    out, err = capsys.readouterr()
    assert "Tom is a zumpus.\n" in out and err == ""


def test_ctrl_c_stops_an_answer_and_not_the_talk(directory, monkeypatch, capsys):
    class Interrupted(Speaker):
        def generate(self, batch, decoding, replaced=None):
            decoding.ends(self.tokens[:2])
            raise KeyboardInterrupt

    prompts = terminal(monkeypatch, [QUESTION, EOFError()])
    main("fake", lambda *_: Interrupted(), ["--model", str(directory)])
    assert len(prompts) == 2 and "Tom\nstopped\n" in capsys.readouterr().out


def test_from_a_pipe_a_line_is_a_question(twin, directory, monkeypatch, capsys):
    lines = ["", QUESTION, "/k 1", "/again", "/thoughts", "/sweep", "nonsense", "/quit", QUESTION]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as stop:
        main(
            twin.__name__,
            twin.run.make_backend,
            ["--model", str(directory), "--max-new-tokens", "4"],
        )
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and "ProsQA" in err
    rows = out.splitlines()
    assert PROMPT not in out and "\x1b" not in out
    assert [row.split()[0] for row in rows[-4:]] == ["0", "1", "2", "3"]
    assert rows.index("read by the output head") == 3 and rows[1].startswith("1 thoughts")


@pytest.mark.parametrize("argv", [["--latents", "-1"], ["--max-new-tokens", "0"]])
def test_wrong_numbers_end_with_one_message(directory, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main("fake", lambda *_: Speaker(), ["--model", str(directory), *argv])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
