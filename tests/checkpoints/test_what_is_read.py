"""docs/what_is_read.md: its tables are the code's, and every row of them is so.

`PYTHONPATH=. python tests/checkpoints/test_what_is_read.py` writes the tables of fields anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from coconut.checkpoints.architectures import HAND_WRITTEN, TRIED
from coconut.checkpoints.model_args import (
    BORROWED,
    BORROWED_OF_TYPE,
    KNOWN,
    OF_TYPE,
    WITHOUT_EFFECT,
    Limit,
)
from coconut.checkpoints.verdict import judged
from coconut.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/what_is_read.md"
START, END = "<!-- fields: made from the code -->\n", "<!-- end of fields -->\n"
NAMES = {"gpt2": "GPT-2", "qwen2": "Qwen2"}


def limits(hint: Any) -> list[Limit]:
    parts = (hint, *get_args(hint))
    found = [x for part in parts for x in (part, *getattr(part, "__metadata__", ()))]
    return list(dict.fromkeys(x for x in found if isinstance(x, Limit)))


def words(hint: Any) -> str:
    return ", ".join(limit.words for limit in limits(hint)) or "see below"


def hints_of(model_type: str) -> dict[str, Any]:
    made = HAND_WRITTEN[model_type]
    known = get_type_hints(made, include_extras=True)
    return {field.name: known[field.name] for field in fields(made)}


def code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def tables() -> str:
    out = []
    for model_type, name in NAMES.items():
        out += [f"### {name}", "", "| field | must be |", "| --- | --- |"]
        out += [f"| `{n}` | {words(hint)} |" for n, hint in hints_of(model_type).items()]
        further = OF_TYPE[model_type]
        free = [n for n, limit in further.items() if limit is None]
        out += [f"| `{n}` | {limit.words} |" for n, limit in further.items() if limit]
        out += [f"| {code(free)} | anything: without effect |", ""]
    out += ["### Borrowed models", "", "| field | must be |", "| --- | --- |"]
    out += [f"| `{n}` | {words(hint)} |" for n, hint in BORROWED.items() if limits(hint)]
    out += [f"| {code(n for n, hint in BORROWED.items() if not limits(hint))} | see below |"]
    out += [
        f"| of `{t}`: {code(names.split())} | see below |" for t, names in BORROWED_OF_TYPE.items()
    ]
    out += ["", "### Every model", "", "| field | must be |", "| --- | --- |"]
    out += [f"| `{n}` | {limit.words} |" for n, limit in KNOWN.items() if limit]
    out += [
        f"| {use}: {code(names.split())} | anything: without effect |"
        for use, names in WITHOUT_EFFECT.items()
    ]
    return "\n".join(out) + "\n"


def test_the_pages_fields_are_those_of_the_code():
    text = PAGE.read_text()
    assert text[text.index(START) + len(START) : text.index(END)] == tables()


def test_every_row_of_layouts_names_a_test_that_exists():
    text = PAGE.read_text().split("## Checkpoints")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    tests = {
        name
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = [re.findall(r"`(test_\w+)`", row) for row in rows[1:]]
    assert len(named) > 12 and all(named)
    assert {name for names in named for name in names} <= tests


# ---- every row is so

CONFIGS = {
    "gpt2": {"vocab_size": 9, "n_positions": 8, "n_embd": 2, "n_layer": 1, "n_head": 1},
    "qwen2": {
        **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8),
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1),
    },
}
CONFIGS["llama"] = CONFIGS["qwen2"] | {"max_position_embeddings": 8}
CONFIGS = {model_type: {"model_type": model_type} | c for model_type, c in CONFIGS.items()}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_is_used_keeps_its_limits(model_type):
    hints = BORROWED if model_type not in HAND_WRITTEN else hints_of(model_type)
    for name, hint in (hints | KNOWN | OF_TYPE.get(model_type, {})).items():
        for limit in limits(hint):
            for wrong in ([{}], "wide", 2**40, -1, {"0": [1]}, float("nan")):
                try:
                    allowed = limit.allows(wrong)
                except TypeError:  # a lesser limit, behind that of the type
                    continue
                if not allowed:
                    with pytest.raises(UserError, match=rf"{name}: expected|is not supported"):
                        judged(CONFIGS[model_type] | {name: wrong}, "x.json")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_is_without_effect_may_be_anything(model_type):
    free = {n for n, limit in OF_TYPE.get(model_type, {}).items() if limit is None}
    free |= {name for names in WITHOUT_EFFECT.values() for name in names.split()}
    anything = {name: [{"a": np.pi}] for name in free - {"model_type", "architectures"}}
    # Nothing that a model is built from is among them.
    assert not free & set(CONFIGS[model_type] | hints_of("gpt2") | hints_of("qwen2")) - {
        "model_type",
        "max_window_layers",
    }
    assert judged(CONFIGS[model_type] | anything, "x.json").keys() >= anything.keys()


def test_the_fields_of_each_borrowed_model_are_known_for_it_alone():
    for model_type in TRIED:
        own = BORROWED_OF_TYPE.get(model_type, "").split()
        config = CONFIGS["llama"] | {"model_type": model_type}
        judged(config | dict.fromkeys(own), "x.json")
        others = {n for names in BORROWED_OF_TYPE.values() for n in names.split()} - {*own}
        for name in others:
            with pytest.raises(UserError, match=f"{name}: not known here"):
                judged(config | {name: None}, "x.json")


if __name__ == "__main__":
    page = PAGE.read_text()
    start, end = page.index(START) + len(START), page.index(END)
    PAGE.write_text(page[:start] + tables() + page[end:])
    print(json.dumps({"wrote": str(PAGE.relative_to(ROOT))}))
