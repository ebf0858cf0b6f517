"""Reading a run's configuration from YAML and `key=value`, and refusing a wrong one."""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coconut.config.checks import problems_together
from coconut.config.keys import PUBLISHED_NAMES, PUBLISHED_SWITCHES, RunConfig
from coconut.config.latro_keys import LatroConfig, with_preset
from coconut.config.others import without_others
from coconut.config.values import parse_yaml, read_keys, word
from coconut.errors import UserError


def load_config(
    source: str | Path | Mapping[Any, Any], overrides: typing.Sequence[str] = ()
) -> RunConfig:
    """Read a YAML file and `key=value` overrides; check everything that needs no model.

    source: the file, or what it would hold.
    Raises UserError with all problems at once: unknown or ill-typed keys, impossible combinations,
    missing files.
    """
    if isinstance(source, Mapping):
        where, values = "configuration", dict(source)
    else:
        where, values = str(source), read_yaml(source)
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            problems.append(f"{override!r}: overrides are written key=value")
            continue
        try:
            value = parse_yaml(text)
        except ValueError:
            problems.append(f"{name}: cannot read {text!r} as a YAML value; quote it")
            continue
        group, dot, inner = name.partition(".")
        if dot:
            nested = values.get(group) or {}
            values[group] = {**nested, inner: value} if isinstance(nested, dict) else {inner: value}
        else:
            values = {given: v for given, v in values.items() if not _gives_way(given, name)}
            values[name] = value
    return check_config(values, where, problems)


def from_options(words: Sequence[str], kept: Collection[str] = ()) -> list[str]:
    """A command line's words with `--key value` as `key=value`, as transformers' scripts are given.

    What stands before the first plain word (the file) stays, and so do the options in `kept`. Of a
    key several values are a list, no value is True, and `--no_key` is False.
    """
    found: list[str] = []
    left = list(words)
    has_file = False
    while left:
        given = left.pop(0)
        option, equals, text = given.partition("=")
        if not has_file or not given.startswith("--") or option in kept or given == "--":
            has_file = has_file or not given.startswith("-")
            found.append(given)
            continue
        values = [text] if equals else []
        while left and not equals and not left[0].startswith("--") and not _OVERRIDE.match(left[0]):
            values.append(left.pop(0))
        name = option[2:].replace("-", "_")
        keys = LatroConfig.__dataclass_fields__
        known = {*keys, *PUBLISHED_NAMES}
        if not values and name not in known and name.removeprefix("no_") in known:
            name, values = name.removeprefix("no_"), ["False"]
        plain = [_as_yaml(value) for value in values] or ["True"]
        is_list = len(plain) > 1 or (name in keys and str(keys[name].type).startswith("list"))
        found.append(f"{name}=[{', '.join(plain)}]" if is_list else f"{name}={plain[0]}")
    return found


_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def _as_yaml(text: str) -> str:
    """YAML that stands for a word of the command line: a group in brackets, a number, or text."""
    if text[:1] in ("{", "["):
        return text
    with suppress(ValueError):
        if isinstance(parse_yaml(text), (int, float)):  # True and False are numbers, too
            return text
    return json.dumps(text)


def _gives_way(given: Any, override: str) -> bool:
    """Whether a key of the file says what an override says anew, under another name."""
    is_switch = given in PUBLISHED_SWITCHES and override == "method"
    if is_switch or {given, override} == {"wandb", "report_to"}:
        return True
    return PUBLISHED_NAMES.get(given, given) == PUBLISHED_NAMES.get(override, override)


def check_config(
    values: Mapping[Any, Any], where: str = "configuration", problems: list[str] | None = None
) -> RunConfig:
    """Turn a mapping into a RunConfig. Raises UserError with all problems at once."""
    problems = list(problems or [])
    kind: type[RunConfig] = RunConfig
    if values.get("method") in ("latro", "preexperiment"):
        kind, values = LatroConfig, with_preset(values)
    values, others, notes = without_others(values, kind.__dataclass_fields__)
    problems += others
    given: dict[Any, Any] = {}  # key -> the name it is given by
    for theirs in values:
        ours = PUBLISHED_NAMES.get(theirs, theirs)
        if ours != theirs and ours in values:
            problems.append(f"{theirs}: stands for {ours}, which is given too; drop one")
        else:
            given[ours] = theirs
    named = {ours: _at_home(values[theirs]) for ours, theirs in given.items()}
    found, wrong = read_keys(kind, named, PUBLISHED_NAMES, "docs/keys.md lists them")
    if "method" in wrong:  # all else depends on it
        raise UserError(where, *problems, f"method: {wrong['method']}")
    problems += [f"{word(given[name])}: {wrong[name]}" for name in given if name in wrong]
    config = kind(**found)
    config.where, config.notes = where, notes
    # A key that could not be read has its default here, about which nothing need be said.
    failed = wrong.keys() & kind.__dataclass_fields__.keys()
    together = problems_together(config, values)
    problems += [line for line in together if failed.isdisjoint(re.findall(r"\w+", line))]
    if problems:
        raise UserError(where, *[_as_given(line, values) for line in problems])
    return config


def _at_home(value: Any) -> Any:
    """A path that begins in the user's home, written out: a shell does so, a YAML file does not."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _as_given(line: str, given: Mapping[Any, Any]) -> str:
    """A complaint in the names that the keys were given by."""
    for theirs, ours in PUBLISHED_NAMES.items():
        # Not one that is given too; and "name" is a word.
        if theirs in given and ours not in (*given, "name"):
            line = re.sub(rf"\b{ours}\b", theirs, line)
    return line


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Keys and values of a YAML file. Raises UserError if it is not there or not YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file; the runs that ship lie in args/") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(str(path), f"cannot be read as a text file: {error}") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UserError(str(path), str(error)) from None
    if not isinstance(values, (dict, type(None))):
        raise UserError(str(path), "expected `key: value` lines")
    return values or {}
