"""A key's field, and a value of YAML as the type that its key has."""

from __future__ import annotations

import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import Any

import yaml

from coconut.errors import nearest

SHOWN = 60
"""Characters of a wrong value that a message repeats."""

LIMITS = {
    "low": (operator.ge, "at least", "≥", "minimum"),
    "above": (operator.gt, "above", ">", "exclusiveMinimum"),
    "high": (operator.le, "at most", "≤", "maximum"),
    "below": (operator.lt, "below", "<", "exclusiveMaximum"),
}
"""What a number may be held to: the test, its words, its sign, its name in a JSON Schema."""


def key(
    default: Any,
    help: str,
    group: str,
    *,
    read_by: tuple[str, ...] | None = None,
    identity: bool = False,
    choices: tuple[Any, ...] = (),
    complaint: str = "",
    aliases: str = "",
    booleans: tuple[str, ...] = (),
    synonyms: Mapping[str, str] = types.MappingProxyType({}),
    any_text: bool = False,
    released: Any = None,
    **limits: float,
) -> Any:
    """All that is said of a configuration key; what is made of it reads it from the field.

    group: the heading it stands under. read_by: the methods that read it; None: all do. identity:
    with another value it is another run, and the checkpoints of this one are not gone on from.
    limits: of LIMITS. complaint: said of a number outside of its choices or upper limit, instead of
    the usual sentence. aliases: the names that other programs have for it. booleans: published
    meanings of False and True. synonyms: other programs' names of its choices. any_text: line
    breaks and other characters that cannot be printed are meant. released: its value in LaTRO's
    released code, where that differs from the paper.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MOST_VALUES = 100_000
"""Of a text, its aliases written out: a few lines of nested ones stand for billions."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which the library would silently take the last.

    And aliases that stand for more than any configuration holds, or for themselves.
    """

    def construct_document(self, node):  # type: ignore[no-untyped-def]
        if _n_values(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_VALUES:,} values, aliases written out", None
            )
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):  # type: ignore[no-untyped-def]
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{shown(key.value)} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
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


def _n_values(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below one, itself among them, an alias counted as what it stands for."""
    if id(node) not in known:
        known[id(node)] = math.inf  # where it contains itself
        inner: list[Any] = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else [pair])]
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]


def without_none(hint: Any) -> Any:
    """The type that a value has if it is not None."""
    if isinstance(hint, types.UnionType):
        return next(t for t in hint.__args__ if t is not types.NoneType)
    return hint


def _convert(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """Check one value against its key's type. Raises ValueError with the complaint."""
    if value is None or value == "None":  # the published files write the string
        if isinstance(hint, types.UnionType):
            return None
        if hint is str or value is None:
            raise ValueError("needs a value")
    hint = without_none(hint)
    if metadata["any_text"]:
        texts = [value] if hint is str else value
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            wanted = "text" if hint is str else "a list of texts"
            raise ValueError(f"expected {wanted}, got {shown(value)}")
        return value
    if isinstance(value, bool) and metadata["booleans"]:
        return metadata["booleans"][value]
    if typing.get_origin(hint) is list:
        if hint.__args__[0] is str and isinstance(value, str):
            value = [value]  # the only one
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {shown(value)}")
        return [_CONVERTERS[hint.__args__[0]](inner) for inner in value]
    value = _CONVERTERS[typing.get_origin(hint) or hint](value)
    value = metadata["synonyms"].get(value, value) if metadata["synonyms"] else value
    choices, complaint = metadata["choices"], metadata["complaint"]
    if choices and value not in choices:
        *most, last = map(str, choices)
        either = f"{', '.join(most)} or {last}" if hint is int else f"one of {', '.join(choices)}"
        expected = complaint or f"expected {either}"
        raise ValueError(f"{expected}, got {shown(value)}{nearest(value, choices, '; ')}")
    for name, limit in metadata["limits"].items():
        holds, words, *_ = LIMITS[name]
        if not holds(value, limit):
            expected = (complaint if name == "high" else "") or f"must be {words} {limit}"
            raise ValueError(f"{expected}, got {shown(value)}")
    return value


def read_keys(
    kind: type[Any], values: Mapping[Any, Any], others: Iterable[str] = (), advice: str = ""
) -> tuple[dict[str, Any], dict[Any, str]]:
    """The values as their keys' types, and a complaint for each that is wrong or unknown.

    others: names that are known besides the fields of `kind`, and read elsewhere. advice: where no
    known name is near; all of them if empty.
    """
    hints, found = typing.get_type_hints(kind), {}
    known = sorted({*hints, *others})
    advice = advice or f"known: {', '.join(known)}"
    wrong = {n: f"unknown key, {nearest(n, known) or advice}" for n in values if n not in known}
    for f in fields(kind):
        if f.name in values:
            try:
                found[f.name] = _convert(values[f.name], hints[f.name], f.metadata)
            except ValueError as error:
                wrong[f.name] = str(error)
    return found, wrong


def word(name: Any) -> str:
    """A key as a message names it: bare if that is readable."""
    is_plain = isinstance(name, str) and name.isprintable() and len(name) <= SHOWN
    return name if is_plain else shown(name)


def shown(value: Any) -> str:
    """A wrong value as a message repeats it: quoted, and never longer than a line."""
    try:
        text = repr(value)
    # Python writes out neither endless nesting nor whole numbers of thousands of digits.
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected True or False, got {shown(value)}")
    return value


def _int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {shown(value)}")
    if abs(value) >= 2**53:
        raise ValueError(f"too large: {shown(value)}")
    return value


def _float(value: Any) -> float:
    # YAML 1.1 reads 1e-4 (without a dot) as text.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {shown(value)}")
    return number


def _str(value: Any) -> str:
    if isinstance(value, bool):
        word = "on, yes or true" if value else "off, no or false"
        raise ValueError(f"expected text; YAML takes {word} for {value}: write it in quotes")
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {shown(value)}")
    if "\0" in value or not value.isprintable():
        raise ValueError(f"holds characters that cannot be printed: {shown(value)}")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"expected `key: value` lines, got {shown(value)}")
    return value


_CONVERTERS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}
