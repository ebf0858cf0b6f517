"""docs/keys.md, the keys of --help and args/schema.json, made of what the keys' fields say.

    python -m coconut.config.reference > docs/keys.md
    python -m coconut.config.reference --schema > args/schema.json

Keys are listed in the order of their fields. Editors check and complete YAML files by the schema,
of one key at a time. Source: JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from typing import Any

from coconut.config import methods as of_methods
from coconut.config.generate_keys import Generate, options_of
from coconut.config.keys import PUBLISHED_NAMES, RunConfig
from coconut.config.latro_keys import PRESETS, LatroConfig
from coconut.config.lora_keys import Lora
from coconut.config.values import LIMITS, without_none
from coconut.tasks.makers import TASKS

NAMED = {
    of_methods.METHODS: "",
    of_methods.WITH_LATENTS: "with latents",
    of_methods.WITH_STAGE: "with latents, `no_thoughts`",
    of_methods.CURRICULUM: "all but data sets",
    of_methods.DATASET_METHODS: "data sets",
    of_methods.TRAINED: "all but `preexperiment`",
    of_methods.EPOCHS: "all but `latro`, `preexperiment`",
}
"""Sets of methods that the page names in one word."""

_TYPES: dict[Any, str] = {
    **{bool: "boolean", int: "integer", float: "number"},
    **{str: "string", dict: "object", list: "array"},
}


def parts() -> Iterator[tuple[str, Sequence[Field[Any]], object, str]]:
    """Every key of RunConfig once: a heading, its keys, their defaults, their names' beginning.

    The group of a key with keys of its own is followed by them, whose names begin with its name.
    """
    groups: dict[str, list[Field[Any]]] = {}
    for f in fields(RunConfig):
        groups.setdefault(f.metadata["group"], []).append(f)
    made = {f"With `task: {task}`:": options_of(task) for task in TASKS}
    inside: dict[str, dict[str, type[Any]]] = {
        "lora": {"Inside `lora`:": Lora},
        "generate": {"Inside `generate`:": Generate, **made},
    }
    for heading, keys in groups.items():
        yield heading, keys, RunConfig(), ""
        for f in keys:
            for about, kind in inside.get(f.name, {}).items():
                yield about, fields(kind), kind(), f"{f.name}."


def readers(f: Field[Any]) -> str:
    """The methods that read a key, as the page says it; empty if all do."""
    methods = f.metadata["read_by"] or of_methods.METHODS
    return NAMED.get(methods, ", ".join(f"`{method}`" for method in methods))


def help_text() -> str:
    """The keys for --help, a line each, under their headings."""
    lines = []
    for heading, keys, defaults, prefix in parts():
        lines += [f"  {heading}"] if prefix else ["", f"{heading}:"]
        lines += [
            f"  {prefix}{f.name} ({_values(f)}; {_default(defaults, f)}): {f.metadata['help']}"
            for f in keys
        ]
    return "\n".join(lines[1:])


def keys_markdown() -> str:
    """docs/keys.md: `python -m coconut.config.reference > docs/keys.md`; a test compares."""
    lines = [
        "# Keys of a run",
        "",
        "In a YAML file, or as `key=value` behind it on the command line (`generate.items=100` for"
        " keys inside a key). Made from `coconut/config/keys.py` and its neighbours by"
        " `python -m coconut.config.reference`; `--schema` makes `args/schema.json`, by which"
        " editors check YAML files.",
        "",
        "**Read by** says which methods read a key; nothing there means all. *With latents* are "
        + ", ".join(f"`{method}`" for method in of_methods.WITH_LATENTS)
        + "; *data sets* are "
        + ", ".join(f"`{method}`" for method in of_methods.DATASET_METHODS)
        + ". [methods.md](methods.md) explains them. A default of – means that nothing is set. With"
        " another value of a key marked † it is another run, so a run that goes on refuses it"
        " ([runs.md](runs.md#going-on)).",
    ]
    for heading, keys, defaults, prefix in parts():
        lines += ["", heading if prefix else f"## {heading}", "", *_table(keys, defaults, prefix)]
    mine = [f for f in fields(LatroConfig) if f.name in LatroConfig.__annotations__]
    own = [f for f in mine if f.name not in RunConfig.__annotations__]
    changed = [f for f in mine if f.name in RunConfig.__annotations__]
    lines += [
        "",
        f"## {own[0].metadata['group']}",
        "",
        "Other programs' names of keys are taken as well: "
        + ", ".join(f"`{theirs}` ({ours})" for theirs, ours in PUBLISHED_NAMES.items())
        + ".",
        "",
        *_table(own, LatroConfig()),
        "",
        "`preset: released` sets "
        + ", ".join(f"`{k}: {v!r}`" for k, v in PRESETS["released"].items())
        + "; single keys override a preset.",
        "",
        "Keys from above with another default:",
        "",
        *_table(changed, LatroConfig()),
    ]
    return "\n".join(lines) + "\n"


def _table(keys: Sequence[Field[Any]], defaults: object, prefix: str = "") -> list[str]:
    with_readers = any(map(readers, keys))
    heads = ["key", "values", "default", "meaning", *(["read by"] if with_readers else [])]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for f in keys:
        default = _default(defaults, f)
        cells = [
            f"`{prefix}{f.name}`",
            _values(f),
            "–" if default == "None" else f"`{default}`",
        ]
        about = f.metadata["help"] + " †" * f.metadata["identity"]
        cells += [about, *([readers(f)] if with_readers else [])]
        lines.append("| " + " | ".join(cells).replace("  ", " ") + " |")
    return lines


def _values(f: Field[Any]) -> str:
    """What a key takes: its choices, or its type and limits."""
    if f.metadata["choices"]:
        return ", ".join(map(str, f.metadata["choices"]))
    limits = [f" {LIMITS[name][2]} {limit:g}" for name, limit in f.metadata["limits"].items()]
    kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
    return kind.split(" | ")[0].split("[")[0] + ",".join(limits)


def _default(defaults: object, f: Field[Any]) -> str:
    return str(getattr(defaults, f.name)).encode("unicode_escape").decode()


def schema() -> dict[str, Any]:
    """The schema of a run's YAML file, published names of keys included."""
    keys = _properties(LatroConfig) | _properties(RunConfig)
    keys["lora"] |= {"properties": _properties(Lora), "additionalProperties": False}
    tasks = keys["generate"]["anyOf"] = []
    for task in TASKS:
        options = _properties(options_of(task))
        for option in options.values():  # or a list, a value an epoch
            option |= {"type": [option["type"], "array"], "items": {"type": option["type"]}}
        inner = _properties(Generate) | {"task": {"const": task}} | options
        required = [] if task == Generate.task else ["task"]
        tasks.append({"properties": inner, "additionalProperties": False, "required": required})
    for theirs, ours in PUBLISHED_NAMES.items():
        keys[theirs] = {"$ref": f"#/properties/{ours}", "description": f"another name of {ours}"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of mlx-coconut",
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
    }


def _properties(kind: type[Any]) -> dict[str, Any]:
    hints, defaults, found = typing.get_type_hints(kind), kind(), {}
    for f in fields(kind):
        said, default, plain = f.metadata, getattr(defaults, f.name), without_none(hints[f.name])
        nothing = [] if plain is hints[f.name] else [None]
        about = found[f.name] = {"description": said["help"]}
        if default is not None or nothing:
            about["default"] = default
        if said["choices"]:
            booleans = [False, True] if said["booleans"] else []
            about["enum"] = [*said["choices"], *said["synonyms"], *booleans, *nothing]
            continue
        names = [_TYPES[typing.get_origin(plain) or plain], *("null" for _ in nothing)]
        if names[0] == "array":
            about["items"] = {"type": _TYPES[plain.__args__[0]]}
            if plain == list[str] and not said["any_text"]:
                names.append("string")  # the only one
        about["type"] = names if len(names) > 1 else names[0]
        about |= {LIMITS[name][3]: limit for name, limit in said["limits"].items()}
    return found


if __name__ == "__main__":
    as_schema = sys.argv[1:] == ["--schema"]
    print(json.dumps(schema(), indent=2) if as_schema else keys_markdown().rstrip("\n"))
