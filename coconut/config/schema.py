"""args/schema.json: the keys of a run for editors, which check and complete YAML files by it.

    python -m coconut.config.schema > args/schema.json

Of one key at a time; what keys must be together is checked when a run starts.
Source: JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import json
import typing
from dataclasses import Field, fields
from typing import Any

from coconut.config.generate_keys import Generate, options_of
from coconut.config.keys import PUBLISHED_NAMES, RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.config.lora_keys import Lora
from coconut.config.values import LIMITS, without_none
from coconut.tasks.generated import TASKS

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}


def schema() -> dict[str, Any]:
    """The schema of a run's YAML file, published names of keys included."""
    keys = _properties(LatroConfig) | _properties(RunConfig)
    keys["lora"] |= _closed(_properties(Lora))
    tasks = []
    for task in TASKS:
        options = {
            name: _each_epoch(option) for name, option in _properties(options_of(task)).items()
        }
        chosen = _closed(_properties(Generate) | {"task": {"const": task}} | options)
        tasks.append(chosen if task == Generate.task else chosen | {"required": ["task"]})
    keys["generate"]["anyOf"] = tasks
    for theirs, ours in PUBLISHED_NAMES.items():
        keys[theirs] = {"$ref": f"#/properties/{ours}", "description": f"published name of {ours}"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of mlx-coconut",
        "type": "object",
        **_closed(keys),
    }


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"properties": properties, "additionalProperties": False}


def _each_epoch(option: dict[str, Any]) -> dict[str, Any]:
    """An option of a task, or a list of its values."""
    one = {name: value for name, value in option.items() if name not in ("description", "default")}
    return option | {"type": [option["type"], "array"], "items": one}


def _properties(kind: type[Any]) -> dict[str, Any]:
    hints, defaults = typing.get_type_hints(kind), kind()
    return {f.name: _property(f, hints[f.name], getattr(defaults, f.name)) for f in fields(kind)}


def _property(f: Field[Any], hint: Any, default: Any) -> dict[str, Any]:
    said, plain = f.metadata, without_none(hint)
    empty = [] if plain is hint else ["null"]
    found = {"description": said["help"]}
    if default is not None or empty:
        found["default"] = default
    if said["choices"]:
        booleans = [False, True] if said["booleans"] else []
        return found | {"enum": [*said["choices"], *booleans, *([None] if empty else [])]}
    names = [_TYPES.get(typing.get_origin(plain) or plain, "array"), *empty]
    if names[0] == "array":
        inner = plain.__args__[0]
        found["items"] = {"type": _TYPES[inner]}
        names += ["string"] if inner is str and not said["any_text"] else []
    found["type"] = names if len(names) > 1 else names[0]
    return found | {LIMITS[name][3]: limit for name, limit in said["limits"].items()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
