"""The reference of keys: complete, made from the code, and right about who reads what."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import coconut.config
from coconut.batches.curriculum import (
    Markers,
    Sample,
    draw_stage,
    item_rng,
    question_row,
    stage_of_epoch,
    training_row,
)
from coconut.config.generate_keys import Generate, options_of
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.config.lora_keys import Lora
from coconut.config.methods import CURRICULUM, METHODS
from coconut.config.reference import help_text, keys_markdown
from coconut.config.values import LIMITS
from coconut.tasks.makers import TASKS

KEYS = [f.name for f in fields(RunConfig)]
READ_BY = {f.name: f.metadata["read_by"] for f in fields(RunConfig)}


def test_the_reference_of_keys_is_made_from_the_dataclass() -> None:
    written = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()
    assert written == keys_markdown(), "run: python -m coconut.config.reference > docs/keys.md"


def test_every_key_stands_in_the_reference_once_and_in_help() -> None:
    first, latro = keys_markdown().split("\n## Of `method: latro`")
    rows = Counter(re.findall(r"^\| `([\w.]+)` \|", first, re.M))
    inside = [("lora", Lora), ("generate", Generate)]
    inside += [("generate", options_of(task)) for task in TASKS]
    assert rows == Counter(
        [*KEYS, *(f"{key}.{f.name}" for key, kind in inside for f in fields(kind))]
    )
    own = {f.name for f in fields(LatroConfig)} - set(KEYS)
    assert own <= set(re.findall(r"^\| `([\w.]+)` \|", latro, re.M))
    lines = help_text().splitlines()
    for name, n in rows.items():
        found = [line for line in lines if line.startswith(f"  {name} (")]
        assert len(found) == n and not any(line.endswith(": ") for line in found)


@pytest.mark.parametrize("kind", [RunConfig, LatroConfig, Lora, Generate, *map(options_of, TASKS)])
def test_every_key_is_described_in_its_field(kind: type[Any]) -> None:
    for f in fields(kind):
        said = f.metadata
        assert said["help"] and said["group"], f.name
        assert set(said["read_by"] or METHODS) <= set(METHODS) and said["read_by"] != (), f.name
        assert set(said["limits"]) <= set(LIMITS), f.name


def tuples_of_keys(source: str) -> list[list[str]]:
    """Tuples, lists and sets of three or more that name nothing but keys."""
    known = {f.name for f in fields(LatroConfig)} - set(
        METHODS
    )  # the switches are named as methods
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            names = [e.value for e in node.elts if isinstance(e, ast.Constant)]
            if len(names) == len(node.elts) > 2 and known.issuperset(names):
                found.append(names)
    return found


def test_no_list_of_keys_stands_beside_the_fields() -> None:
    assert tuples_of_keys(
        "A = ('seed', 'name', 'lr'); B = ('seed', 'name'); C = ['seed', 'name', 'x']"
    )
    for path in Path(coconut.config.__path__[0]).glob("*.py"):
        assert tuples_of_keys(path.read_text()) == [], path


BASE: dict[str, Any] = {
    "c_thought": 2,
    "max_latent_stage": 2,
    "epochs_per_stage": 2,
    "icot_tokens_per_epoch": 0.5,
}
OTHER: dict[str, Any] = {
    "c_thought": 3,
    "epochs_per_stage": 1,
    "max_latent_stage": 1,
    "pad_latent_to_max": False,
    "latent_growth": "one",
    "uniform_prob": 1.0,
    "stage_mixing": "item",
    "icot_tokens_per_epoch": 2.0,
    "icot_smoothing": 0.1,
    "icot_remove_all_after": 2,
    "recall_sentences": 1,
}
"""Another value of each key that the curriculum reads."""
SAMPLES = [Sample(n, [1, 2, 3], [[10 + i, 20 + i] for i in range(n)], [7, 8]) for n in range(1, 5)]


def rows_of(config: RunConfig) -> list[Any]:
    """All that training and evaluation see over some epochs."""
    seen: list[Any] = []
    markers = Markers(30, 31, 32)
    for epoch in range(8):
        scheduled = stage_of_epoch(config, epoch)
        for sample in SAMPLES:
            rng = item_rng(0, epoch, sample.idx)
            # Methods without stages may not ask for a draw: the configuration refuses it.
            stage = draw_stage(config, scheduled, len(sample.steps), rng)
            row = training_row(config, sample, stage, markers, rng, float(epoch))
            seen += [row.ids, row.labels, question_row(config, sample, stage, markers).ids]
    return seen


@pytest.mark.parametrize("key", OTHER)
def test_the_reference_names_exactly_the_methods_whose_rows_a_key_changes(key: str) -> None:
    changed = set()
    for method in CURRICULUM:
        config = RunConfig(method=method, **BASE)
        draws = key in ("uniform_prob", "stage_mixing")
        if draws and method not in READ_BY[key]:
            # The draw moves the random stream of every method; that it is refused is its test.
            continue
        if rows_of(config) != rows_of(replace(config, **{key: OTHER[key]})):
            changed.add(method)
    assert changed == set(READ_BY[key])
