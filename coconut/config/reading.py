"""RunConfig: every key of a run, its default, type and meaning; reading and checking YAML."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from coconut.config.checks import (
    _combinations,
    _data_set_problems,
    _generate_problems,
    _lora_problems,
    _missing_files,
    _resolve_method,
    _resolve_tracker,
)
from coconut.config.keys import METHODS, PUBLISHED_NAMES, PUBLISHED_SWITCHES, RunConfig
from coconut.config.values import _convert, _nearest, _parse_yaml, _shown, _word
from coconut.errors import UserError


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and `key=value` overrides; check everything that needs no model.

    Raises UserError with all problems at once: unknown or ill-typed keys, impossible combinations,
    missing files.
    """
    where = str(path)
    values = _read_yaml(path)
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            problems.append(f"{override!r}: overrides are written key=value")
            continue
        try:
            value = _parse_yaml(text)
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
    if values.get("method") is not None and values["method"] not in METHODS:
        # All else depends on it.
        guess = _nearest(values["method"], METHODS)
        shown = _shown(values["method"]) + (f"; {guess}" if guess else "")
        problems.append(f"method: expected one of {', '.join(METHODS)}, got {shown}")
        raise UserError(where, *problems)
    kind: type[RunConfig] = RunConfig
    if values.get("method") in ("latro", "preexperiment"):
        from coconut.config.latro_keys import LatroConfig, with_preset

        kind, values = LatroConfig, with_preset(values)
    known = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    config = kind()
    config.where = where
    failed = set()
    for given, value in values.items():
        name = PUBLISHED_NAMES.get(given, given) if isinstance(given, str) else given
        if name != given and name in values:
            problems.append(f"{given}: stands for {name}, which is given too; drop one")
            continue
        if name not in known:
            advice = _nearest(name, known | PUBLISHED_NAMES) or "docs/keys.md lists them"
            problems.append(f"{_word(name)}: unknown key, {advice}")
            continue
        try:
            setattr(config, name, _convert(name, value, hints[name], known[name].metadata))
        except ValueError as error:
            problems.append(f"{given}: {error}")
            failed.add(name)
    together = [
        *_resolve_method(config),
        *_resolve_tracker(config),
        *_combinations(config),
        *_data_set_problems(config, values),
        *_generate_problems(config),
        *_lora_problems(config),
        *_missing_files(config),
        *config.problems(values),
    ]
    # A key that could not be read has its default here, about which nothing need be said.
    problems += [line for line in together if failed.isdisjoint(re.findall(r"\w+", line))]
    if problems:
        raise UserError(where, *[_as_given(line, values) for line in problems])
    return config


def _as_given(line: str, given: Mapping[Any, Any]) -> str:
    """A complaint in the names that the keys were given by."""
    for theirs, ours in PUBLISHED_NAMES.items():
        if theirs in given and ours != "name":  # which is a word, too
            line = re.sub(rf"\b{ours}\b", theirs, line)
    return line


def _read_yaml(path: str | Path) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file; the runs that ship lie in args/") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(str(path), f"cannot be read as a text file: {error}") from None
    try:
        values = _parse_yaml(text)
    except ValueError as error:
        raise UserError(str(path), str(error)) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(str(path), "expected `key: value` lines")
    return values
