"""docs/keys.md and the keys of --help: every key of a run, in groups, with who reads it.

    python -m coconut.config.reference > docs/keys.md

All of it is said in the keys' fields, and listed in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from coconut.config.generate_keys import Generate, options_of
from coconut.config.keys import (
    BY_EPOCH,
    CURRICULUM,
    DATASET_METHODS,
    METHODS,
    PUBLISHED_NAMES,
    TRAINED,
    WITH_LATENTS,
    WITH_STAGE,
    RunConfig,
)
from coconut.config.latro_keys import PRESETS, LatroConfig
from coconut.config.lora_keys import Lora
from coconut.config.values import LIMITS
from coconut.tasks.generated import TASKS

NAMED = {
    METHODS: "",
    WITH_LATENTS: "with latents",
    WITH_STAGE: "with latents, `no_thoughts`",
    CURRICULUM: "all but data sets",
    DATASET_METHODS: "data sets",
    TRAINED: "all but `preexperiment`",
    BY_EPOCH: "all but `latro`, `preexperiment`",
}
"""Sets of methods that the page names in one word."""


def grouped() -> dict[str, list[Field[Any]]]:
    """Every key of RunConfig once, under its heading."""
    found: dict[str, list[Field[Any]]] = {}
    for f in fields(RunConfig):
        found.setdefault(f.metadata["group"], []).append(f)
    return found


def inside(name: str) -> dict[str, type[Any]]:
    """What a key holds that has keys of its own: a heading, and the class of its keys."""
    if name == "lora":
        return {"Inside `lora`": Lora}
    if name == "generate":
        options = {f"With `task: {task}`": options_of(task) for task in TASKS}
        return {"Inside `generate`": Generate, **options}
    return {}


def readers(f: Field[Any]) -> str:
    """The methods that read a key, as the page says it; empty if all do."""
    methods = f.metadata["read_by"] or METHODS
    return NAMED.get(methods, ", ".join(f"`{method}`" for method in methods))


def help_text() -> str:
    """The keys for --help, a line each, under their headings."""
    lines = []
    for heading, keys in grouped().items():
        lines += ["", f"{heading}:", *_lines(keys, RunConfig())]
        for f in keys:
            for about, kind in inside(f.name).items():
                lines += [f"  {about}:", *_lines(fields(kind), kind(), f"{f.name}.")]
    return "\n".join(lines[1:])


def _lines(keys: Sequence[Field[Any]], defaults: object, prefix: str = "") -> list[str]:
    return [
        f"  {prefix}{f.name} ({_values(f)}; {_default(defaults, f)}): {f.metadata['help']}"
        for f in keys
    ]


def keys_markdown() -> str:
    """docs/keys.md: `python -m coconut.config.reference > docs/keys.md`; a test compares."""
    lines = [
        "# Keys of a run",
        "",
        "In a YAML file, or as `key=value` behind it on the command line (`generate.items=100` for"
        " keys inside a key). Made from `coconut/config/keys.py` and its neighbours by"
        " `python -m coconut.config.reference`; so is `args/schema.json`, by which editors check"
        " YAML files, by `python -m coconut.config.schema`.",
        "",
        "**Read by** says which methods read a key; nothing there means all. *With latents* are "
        + ", ".join(f"`{method}`" for method in WITH_LATENTS)
        + "; *data sets* are "
        + ", ".join(f"`{method}`" for method in DATASET_METHODS)
        + ". [methods.md](methods.md) explains them. A default of – means that nothing is set.",
    ]
    for heading, keys in grouped().items():
        lines += ["", f"## {heading}", "", *_table(keys, RunConfig())]
        for f in keys:
            for about, kind in inside(f.name).items():
                lines += ["", f"{about}:", "", *_table(fields(kind), kind(), f"{f.name}.")]
    defaults, common = LatroConfig(), RunConfig()
    own = [f for f in fields(LatroConfig) if not hasattr(common, f.name)]
    changed = [
        f
        for f in fields(LatroConfig)
        if hasattr(common, f.name) and getattr(defaults, f.name) != getattr(common, f.name)
    ]
    lines += [
        "",
        f"## {own[0].metadata['group']}",
        "",
        "LaTRO's published names of keys are taken as well: "
        + ", ".join(f"`{theirs}` ({ours})" for theirs, ours in PUBLISHED_NAMES.items())
        + ".",
        "",
        *_table(own, defaults),
        "",
        "`preset: released` sets "
        + ", ".join(f"`{k}: {v!r}`" for k, v in PRESETS["released"].items())
        + "; single keys override a preset.",
        "",
        "Keys from above with another default:",
        "",
        *_table(changed, defaults),
    ]
    return "\n".join(lines) + "\n"


def _table(keys: Sequence[Field[Any]], defaults: object, prefix: str = "") -> list[str]:
    with_readers = any(map(readers, keys))
    heads = ["key", "values", "default", "meaning", *(["read by"] if with_readers else [])]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for f in keys:
        default = _default(defaults, f)
        cells = [f"`{prefix}{f.name}`", _values(f), "–" if default == "None" else f"`{default}`"]
        cells += [f.metadata["help"], *([readers(f)] if with_readers else [])]
        lines.append("| " + " | ".join(cells).replace("  ", " ") + " |")
    return lines


def _values(f: Field[Any]) -> str:
    """What a key takes: its choices, or its type and limits."""
    if f.metadata["choices"]:
        return ", ".join(map(str, f.metadata["choices"]))
    limits = [f" {LIMITS[name][2]} {limit:g}" for name, limit in f.metadata["limits"].items()]
    return str(f.type).split(" | ")[0].split("[")[0] + ",".join(limits)


def _default(defaults: object, f: Field[Any]) -> str:
    return str(getattr(defaults, f.name)).encode("unicode_escape").decode()


if __name__ == "__main__":
    print(keys_markdown(), end="")
