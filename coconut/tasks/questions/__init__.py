"""The data sets LaTRO, SFT and the pre-experiment read: one file here is one data set.

A file NAME.py is the data set `dataset_name: NAME`; one elsewhere is named by its path. A JSON file
with three columns is one too (`_columns.py`). docs/data_sets.md walks through one. It has

    FILES: dict[str, str]         path of "train", of "test" and, if there is one, of "validation"
    HOW: str                      one line: how to get those files
    read(path) -> list[item]      the items of a file: dicts with question and groundtruth, and
                                  rationales if people wrote some, all of them texts
    prompt(item, chat) -> str     what the user asks; chat: it goes into a chat template
    response(item) -> str         the right answer as the model is to say it
    answer(output, item) -> str   the answer in a text, normalised; "" if it holds none

and may have

    sft_prompt(item, chat)        the same for SFT; otherwise prompt
    sft_response(item)            what SFT trains on; otherwise the rationale, if any, on
                                  lines of its own, and the response
    sft_published_prompt(...)     how the published code asks an SFT model; otherwise sft_prompt
    released(output, item)        whether it is right by the published rule; otherwise by `answer`
    SHOTS: str, N_SHOTS: int      worked examples before the question (NAME_8shot), and how many
    REWARDS: dict[str, function]  rewards of LaTRO besides likelihood and correct: name ->
                                  (prompt, rationale, answer, groundtruth) -> number; the answer
                                  is what `answer` reads in the output

An output is right if its `answer` is that of the item's own `response`.
"""

import importlib
import inspect
import os
import pkgutil
import re
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coconut.errors import UserError, nearest
from coconut.tasks.questions._columns import parts_of

REQUIRED = ("FILES", "HOW", "read", "prompt", "response", "answer")
_VALUES: dict[str, type] = {
    **{"FILES": dict, "HOW": str, "SHOTS": str, "N_SHOTS": int},
    "REWARDS": dict,
}
_FUNCTIONS: dict[str, tuple[str, type]] = {
    "read": ("read(path)", list),
    "prompt": ("prompt(item, chat)", str),
    "response": ("response(item)", str),
    "answer": ("answer(output, item)", str),
    "sft_prompt": ("sft_prompt(item, chat)", str),
    "sft_response": ("sft_response(item)", str),
    "sft_published_prompt": ("sft_published_prompt(item, chat)", str),
    "released": ("released(output, item)", bool),
}
"""How a part is called, and what it gives."""
_REWARD = "(prompt, rationale, answer, groundtruth)"
_IN_WORDS: dict[Any, str] = {
    **{dict: "a dict", str: "text", int: "a number", list: "a list of items", bool: "a bool"},
    (int, float): "a number",
}
_SPLITS = ("train", "validation", "test")
SHOWN = 80
"""Characters of a question in a message."""
_COLUMNS = (".json", ".jsonl")
_SHOT_NAME = re.compile(r"(.+)_(\d+)shot")
_ADVICE = "docs/data_sets.md shows a whole data set"


def names() -> list[str]:
    """The data sets there are: the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def parse_name(dataset_name: str) -> tuple[str, int]:
    """(data set, worked examples in front) of a name such as gsm8k, gsm8k_0shot, gsm8k_8shot."""
    found = _SHOT_NAME.fullmatch(dataset_name)
    return (found[1], int(found[2])) if found else (dataset_name, 0)


def no_such_set(name: str) -> str | None:
    """What is wrong with the name of a data set, worked examples aside; None if there is one.

    A name is one of `names`; NAME.py, a data set of the user's own; or a file with the columns of
    `_columns.py`, alone or as NAME:FILE, whose answers are read as those of NAME.
    """
    rule, colon, file = name.rpartition(":")
    if not name.endswith((".py", *_COLUMNS)):
        advice = nearest(name, names()) or f"known: {', '.join(names())}, or a file"
        advice += "; docs/data_sets.md says how to add one"
        return None if name in names() else f"no data set {name[:SHOWN]!r}, {advice}"
    if not Path(file).is_file():
        return f"no such file: {file[:SHOWN]}"
    if colon and (rule not in names() or not file.endswith(_COLUMNS)):
        return (
            f"before the colon of {name[:SHOWN]!r} stands the data set whose answers are read alike"
        )
    return None


def load(name: str) -> SimpleNamespace:
    """The parts of a data set, as its file names them; name: see `no_such_set`.

    Raises UserError, with the file and its line, for whatever is wrong in the file: here if it
    cannot be imported or a part is missing or of another kind than it should be; in a part's call
    if that raises something or gives another kind of thing.
    """
    rule, _, path = name.rpartition(":")
    if path.endswith(_COLUMNS):
        parts = parts_of(path, load(rule).answer if rule else None)
        return SimpleNamespace(REWARDS={}, **parts)
    if name.endswith(".py"):
        spec = spec_from_file_location(Path(name).stem, os.path.abspath(name))
    else:
        spec = find_spec(f"{__name__}.{name}")
    file = str(spec.origin if spec else name)
    try:
        if name.endswith(".py"):
            assert spec is not None and spec.loader is not None, "a file that is there"
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(f"{__name__}.{name}")
    except UserError:
        raise
    except Exception as error:
        raise _mistake(file, "cannot be imported", error) from error
    parts = {
        part: getattr(module, part) for part in (*_VALUES, *_FUNCTIONS) if part in vars(module)
    }
    if problems := _problems(parts):
        raise UserError(file, f"{'; '.join(problems)}; {_ADVICE}")
    for part in _FUNCTIONS.keys() & parts:
        parts[part] = _watched(file, *_FUNCTIONS[part], parts[part])
    parts["REWARDS"] = {
        reward: _watched(file, f"REWARDS[{reward!r}]{_REWARD}", (int, float), function)
        for reward, function in parts.get("REWARDS", {}).items()
    }
    return SimpleNamespace(**parts)


def _problems(parts: dict[str, Any]) -> list[str]:
    """What the parts lack, and which are of another kind than they should be."""
    missing = [part for part in REQUIRED if part not in parts]
    if "N_SHOTS" in parts and "SHOTS" not in parts:
        missing.append("SHOTS")
    found = []
    for part, kind in _VALUES.items():
        if part in parts and not isinstance(parts[part], kind):
            found.append(f"{part} must be {_IN_WORDS[kind]}, got {type(parts[part]).__name__}")
    for part, (call, _) in _FUNCTIONS.items():
        if part in parts and not callable(parts[part]):
            found.append(f"{part} must be a function, {call}, got {type(parts[part]).__name__}")
    rewards = parts.get("REWARDS", {})
    for reward, function in rewards.items() if isinstance(rewards, dict) else ():
        if not callable(function):
            got = type(function).__name__
            found.append(f"REWARDS[{reward!r}] must be a function, {_REWARD}, got {got}")
    files = parts.get("FILES", {})
    if isinstance(files, dict):
        missing += [f"FILES[{part!r}]" for part in ("train", "test") if part not in files]
        for part, path in files.items():
            if part not in _SPLITS:
                found.append(f"FILES has no part {part!r}, only {', '.join(_SPLITS)}")
            elif not isinstance(path, str):
                found.append(f"FILES[{part!r}] must be text, got {type(path).__name__}")
    return [*([f"lacks {', '.join(missing)}"] if missing else []), *found]


def _watched(file: str, call: str, kind: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, held to what the part has to give."""

    def watched(*given: Any) -> Any:
        try:
            found = function(*given)
        except UserError:
            raise
        except Exception as error:
            raise _mistake(file, f"{call} failed on {_shown(given)}", error, function) from error
        if not isinstance(found, kind):
            got = "None" if found is None else type(found).__name__
            raise UserError(
                _place(file, function),
                f"{call} must give {_IN_WORDS[kind]}, got {got} for {_shown(given)}; {_ADVICE}",
            )
        return found

    return watched


def _shown(given: Sequence[Any]) -> str:
    """What a part was called with: the question of an item, or the path of a file."""
    item = next((g for g in given if isinstance(g, dict)), None)
    if item is None:
        return repr(str(given[0]))
    text = repr(item.get("question"))
    return text if len(text) <= SHOWN else text[:SHOWN] + "...'"


def _mistake(
    file: str, what: str, error: Exception, function: Callable[..., Any] | None = None
) -> UserError:
    """The error with the last line of the data set's file that led to it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError):
        # One in a file that this one imports is at the line of the import.
        lines = [*lines, error.lineno] if error.filename == file else lines
        said = error.msg
    else:
        said = str(error)
    where = f"{file} line {lines[-1]}" if lines and lines[-1] else _place(file, function)
    said = " ".join(f"{type(error).__name__}: {said}".split())
    return UserError(where, f"{what} ({said}); {_ADVICE}")


def _place(file: str, function: Callable[..., Any] | None) -> str:
    """The file, with the line a function begins at if it is of the file."""
    code = getattr(inspect.unwrap(function), "__code__", None) if function else None
    if code is None or code.co_filename != file:
        return file
    return f"{file} line {code.co_firstlineno}"
