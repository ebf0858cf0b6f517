"""A key's field, and a value of YAML as the type that its key has."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import yaml

SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    any_text: bool = False,
) -> Any:
    """A configuration key: its default, its help line and the values it may take.

    any_text: line breaks and other characters that cannot be printed are meant.
    """
    metadata = {"help": help, "choices": choices, "low": low, "any_text": any_text}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which the library would silently take the last."""

    def construct_mapping(self, node, deep=False):  # type: ignore[no-untyped-def]
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_shown(key.value)} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """The value a YAML text stands for. Raises ValueError saying where it is broken."""
    try:
        return yaml.load(text, Loader=_Loader)
    # The library raises whatever a malformed scalar makes it stumble over: KeyError on
    # `!!bool x`, IndexError on `!!int`, AttributeError on `!!timestamp x`, and more.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ValueError(f"{place}not valid YAML: {what}") from None


def _convert(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """Check one value against its key's type. Raises ValueError with the complaint."""
    optional = isinstance(hint, types.UnionType)
    if value is None or value == "None":  # the published files write the string
        if optional:
            return None
        if hint is str or value is None:
            raise ValueError("needs a value")
    if optional:
        hint = next(t for t in hint.__args__ if t is not types.NoneType)
    if metadata["any_text"]:
        texts = [value] if hint is str else value
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            wanted = "text" if hint is str else "a list of texts"
            raise ValueError(f"expected {wanted}, got {_shown(value)}")
        return value
    if name == "reset_optimizer" and isinstance(value, bool):
        return "epoch" if value else "never"
    if typing.get_origin(hint) is list:
        return _list(value, _CONVERTERS[hint.__args__[0]])
    value = _CONVERTERS[typing.get_origin(hint) or hint](value)
    choices, low = metadata["choices"], metadata["low"]
    if choices and value not in choices:
        guess = _nearest(value, choices)
        guess = f"; {guess}" if guess else ""
        raise ValueError(f"expected one of {', '.join(choices)}, got {_shown(value)}{guess}")
    if low is not None and value < low:
        raise ValueError(f"must be at least {low}, got {_shown(value)}")
    return value


def _nearest(name: Any, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f"did you mean {near[0]}?" if near else ""


def _word(name: Any) -> str:
    """A key as a message names it: bare if that is readable."""
    is_plain = isinstance(name, str) and name.isprintable() and len(name) <= SHOWN
    return name if is_plain else _shown(name)


def _shown(value: Any) -> str:
    """A wrong value as a message repeats it: quoted, and never longer than a line."""
    try:
        text = repr(value)
    # Python writes out neither endless nesting nor whole numbers of thousands of digits.
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected True or False, got {_shown(value)}")
    return value


def _int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {_shown(value)}")
    if abs(value) >= 2**53:
        raise ValueError(f"too large: {_shown(value)}")
    return value


def _float(value: Any) -> float:
    # YAML 1.1 reads 1e-4 (without a dot) as text.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number, got {_shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {_shown(value)}")
    return number


def _str(value: Any) -> str:
    if isinstance(value, bool):
        word = "on, yes or true" if value else "off, no or false"
        raise ValueError(f"expected text; YAML takes {word} for {value}: write it in quotes")
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {_shown(value)}")
    if "\0" in value or not value.isprintable():
        raise ValueError(f"holds characters that cannot be printed: {_shown(value)}")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"expected `key: value` lines, got {_shown(value)}")
    return value


def _list(value: Any, convert: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {_shown(value)}")
    return [convert(inner) for inner in value]


_CONVERTERS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}
