"""Tokenizer directories and chat templates that come with a download and are not meant well."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from conftest import examples, few
from hypothesis import given
from hypothesis import strategies as st

from coconut.errors import UserError
from coconut.text import filling
from coconut.text.chat import end_of_turn, render
from coconut.text.opening import load_tokenizer
from coconut.text.tiktoken import bytes_encoding

ASKED = [{"role": "user", "content": "Is Tom a wumpus?"}]


def use(directory: Path) -> None:
    """All that a run does with a tokenizer before it trains."""
    tokenizer = load_tokenizer(directory).with_latents()
    tokenizer.decode(tokenizer.encode_question("Tom is ü 5.\n"))
    if tokenizer.chat_template is not None:
        tokenizer.encode_filled(render(tokenizer, ASKED))
        end_of_turn(tokenizer, True)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    chat_tokenizer(directory, TEMPLATES["chatml"], eos="<|im_end|>")
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    use(directory)
    return directory


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def word_level(directory: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "<|im_end|>": 1}, "unk_token": "<unk>"}
    changed(directory / "tokenizer.json", model=model, added_tokens=[], post_processor=None)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda d: (d / "chat_template.jinja").write_bytes(b"\xff{{"),
            r"chat_template\.jinja: not UTF-8 text",
        ),
        (
            lambda d: changed(d / "tokenizer_config.json", chat_template=["a", 1]),
            r"tokenizer_config\.json: chat_template: expected a text",
        ),
        (
            lambda d: changed(d / "tokenizer_config.json", chat_template=5),
            r"tokenizer_config\.json: chat_template: expected a text",
        ),
        (
            lambda d: changed(d / "tokenizer_config.json", eos_token="\ud800"),
            r"tokenizer_config\.json: not JSON, .* surrogates not allowed",
        ),
        (word_level, "cannot encode a text: .*UNK"),
        (lambda d: changed(d / "tokenizer.json", model={}), r"tokenizer\.json: not a tokenizer"),
    ],
)
def test_what_is_wrong_in_a_directory_is_named(good, tmp_path, harm, message):
    harm(directory := Path(shutil.copytree(good, tmp_path / "model")))
    with pytest.raises(UserError, match=message):
        use(directory)


def test_a_template_without_a_name_is_not_the_default(good, tmp_path):
    directory = Path(shutil.copytree(good, tmp_path / "model"))
    templates = [{"template": "a"}, {"name": ["x"], "template": 1}, {"name": "default"}]
    changed(directory / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(directory).chat_template is None
    templates[2]["template"] = "b"
    changed(directory / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(directory).chat_template == "b"


@pytest.mark.parametrize("pattern", ["(", r"(a+)+$|(?=(a|aa)+b)[\s\S]", r"(?:(?:a?)*)*b|(?!x)"])
def test_a_pattern_that_the_library_cannot_use_is_one_line(tmp_path, pattern, capfd):
    bytes_encoding().save(tmp_path)
    changed(tmp_path / "encoding.json", pat_str=pattern)
    try:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.encode("a" * 5_000)
    except UserError as error:
        assert ("\n" not in str(error) and "pat" in str(error)) or "cannot encode" in str(error)


def test_a_panic_of_the_library_is_one_line(tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 names it; no Exception."""

    class Panics:
        def encode_ordinary(self, text):
            raise PanicException("called `Result::unwrap()` on an `Err` value\nBacktrace")

    tokenizer = bytes_encoding()
    monkeypatch.setattr(tokenizer, "_encoding", Panics())
    with pytest.raises(UserError, match="cannot encode a text: called") as refused:
        tokenizer.encode("a")
    assert "\n" not in str(refused.value)


# --- templates

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}%s{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    few(
        [
            ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
            (NESTED.replace("%s", ""), "takes more than 1 s"),
            (NESTED.replace("%s", "x"), "makes more than 1,048,576 characters"),
            ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
            (DOUBLED, "MemoryError"),
            ("{{ 'x' | center(10 ** 10) }}", "MemoryError"),
            ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
            ("{{" + "(" * 5_000 + ")" * 5_000 + "}}", "RecursionError"),
            (
                "{{ ''.__class__.__mro__ }}",
                "access to attribute '__class__' of 'str' object is unsafe",
            ),
            ("{{ messages[7].content }}", "has no element 7"),
            ("{% if %}", "Expected an expression"),
            ("{{ raise_exception('no system\n') }}", "no system"),
        ],
        4,
    ),
)
def test_a_template_that_fails_or_never_ends_is_one_line(good, monkeypatch, template, message):
    monkeypatch.setattr(filling, "SECONDS", 1)
    tokenizer = load_tokenizer(good)
    tokenizer.chat_template = template
    begin = time.monotonic()
    with pytest.raises(UserError) as refused:
        render(tokenizer, ASKED)
    assert message in str(refused.value) and time.monotonic() - begin < 60
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert "<|im_start|>user\nIs Tom" in render(tokenizer, ASKED)  # it is there for the next


def test_an_interrupted_answer_is_not_the_next_ones(monkeypatch):
    filler = filling.Filler()
    assert filler.fill("{{ a }}", {"a": 1}) == "1"
    answer = filler._answer

    def interrupted(request):
        answer(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(filler, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filler.fill("{{ a }}", {"a": 2})
    monkeypatch.undo()
    assert filler.fill("{{ a }}", {"a": 3}) == "3"
    filler.close()


# --- mutants

N = int(os.environ.get("HOSTILE_TOKENIZERS", "100"))
"""Percent of the usual number of mutants; 1,000 were tried with 1000."""
LEAF = st.none() | st.booleans() | st.integers(-3, 400) | st.text(max_size=6) | st.just("\ud800")
ANY = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "template", "content", "type", "a"]), inner)
    ),
    max_leaves=6,
)


def mutate(value: Any, where: list[int], new: Any) -> Any:
    """The value with another one at a place, named by the turns taken on the way to it."""
    if not where or not isinstance(value, dict | list) or not value:
        return new
    names = sorted(value) if isinstance(value, dict) else range(len(value))
    name = names[where[0] % len(names)]
    inner = mutate(value[name], where[1:], new)
    if isinstance(value, dict):
        return {**value, name: inner}
    return [*value[:name], inner, *value[name + 1 :]]


@examples(N)
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]),
    where=st.lists(st.integers(0, 1000), min_size=1, max_size=4),
    new=ANY,
)
def test_a_mutated_directory_is_a_tokenizer_or_named(good, tmp_path_factory, name, where, new):
    directory = tmp_path_factory.getbasetemp() / "mutant"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(good, directory)
    content = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(mutate(content, where, new)))
    try:
        use(directory)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 600
