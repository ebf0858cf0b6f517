"""The schema that editors check YAML files by: made from the keys, and right about args/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coconut.config.keys import PUBLISHED_NAMES
from coconut.config.methods import METHODS
from coconut.config.reference import schema

ARGS = Path(__file__).parents[2] / "args"
WRITTEN = json.loads((ARGS / "schema.json").read_text())
KINDS: dict[str, Any] = {
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
    "null": type(None),
}
KNOWN = {"$schema", "title", "description", "default", "type", "enum", "const", "properties"} | {
    *("additionalProperties", "required", "items", "anyOf", "$ref"),
    *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"),
}


def is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS[kind]) or (
        kind == "integer" and isinstance(value, float) and value.is_integer()
    )


def complaints(value: Any, rules: dict[str, Any], where: str = "") -> list[str]:
    """What is wrong with a value by the words of JSON Schema that ours uses."""
    assert set(rules) <= KNOWN, "teach this test the new word"
    if "$ref" in rules:
        rules = WRITTEN["properties"][rules["$ref"].removeprefix("#/properties/")]
    kinds = rules.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(is_a(value, kind) for kind in kinds):
        return [f"{where}: not of type {kinds}"]
    found = []
    for choices in ([rules["const"]] if "const" in rules else None, rules.get("enum")):
        if choices is not None and not any(c == value and type(c) is type(value) for c in choices):
            found.append(f"{where}: not one of {choices}")
    if isinstance(value, (int, float)):
        limits = {
            "minimum": value >= rules.get("minimum", value),
            "maximum": value <= rules.get("maximum", value),
            "exclusiveMinimum": value > rules.get("exclusiveMinimum", value - 1),
            "exclusiveMaximum": value < rules.get("exclusiveMaximum", value + 1),
        }
        found += [f"{where}: beyond {name}" for name, holds in limits.items() if not holds]
    if isinstance(value, list):
        for inner in value:
            found += complaints(inner, rules.get("items", {}), f"{where}[]")
    if isinstance(value, dict):
        of_keys = rules.get("properties", {})
        found += [
            f"{where}.{name}: missing" for name in rules.get("required", []) if name not in value
        ]
        for name, inner in value.items():
            if name in of_keys:
                found += complaints(inner, of_keys[name], f"{where}.{name}")
            elif not rules.get("additionalProperties", True):
                found.append(f"{where}.{name}: unknown")
    if "anyOf" in rules:
        found += min((complaints(value, one, where) for one in rules["anyOf"]), key=len)
    return found


def test_the_schema_is_made_from_the_keys() -> None:
    assert schema() == WRITTEN, (
        "run: python -m coconut.config.reference --schema > args/schema.json"
    )


@pytest.mark.parametrize("path", sorted(ARGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_run_that_ships_names_the_schema_and_keeps_to_it(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    prefix, _, target = first.partition("=")
    assert prefix == "# yaml-language-server: $schema"
    assert (path.parent / target).resolve() == (ARGS / "schema.json").resolve()
    assert second.startswith("# ") and second[2:3].isalnum()  # what the run is, in words
    assert complaints(yaml.safe_load(path.read_text()), WRITTEN) == []


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"c_thougt": 1}, ".c_thougt: unknown"),
        ({"lr": "fast"}, ".lr: not of type"),
        ({"seed": 1.5}, ".seed: not of type"),
        ({"bf16": 1}, ".bf16: not of type"),
        ({"method": "coconuts"}, ".method: not one of"),
        ({"reset_optimizer": 1}, ".reset_optimizer: not one of"),
        ({"epochs_per_stage": 0}, ".epochs_per_stage: beyond minimum"),
        ({"uniform_prob": 1.5}, ".uniform_prob: beyond maximum"),
        ({"adam_beta2": 1}, ".adam_beta2: beyond exclusiveMaximum"),
        ({"learning_rate": "fast"}, ".learning_rate: not of type"),
        ({"lora": {"scale": 0}}, ".lora.scale: beyond exclusiveMinimum"),
        ({"lora": {"rnak": 4}}, ".lora.rnak: unknown"),
        ({"lora": {"quantize": 3}}, ".lora.quantize: not one of"),
        ({"stop_seqs": [1]}, ".stop_seqs[]: not of type"),
        ({"generate": {"items": 0}}, ".generate.items: beyond minimum"),
        ({"generate": {"hops": 3}}, ".generate.hops: unknown"),
        (
            {"generate": {"task": "hops", "hops": 3, "concepts": 4, "nodes": 3}},
            ".generate.nodes: unknown",
        ),
        ({"generate": {"nodes": [5, "x"]}}, ".generate.nodes[]: not of type"),
    ],
)
def test_a_wrong_key_or_value_fails(values: dict[str, Any], complaint: str) -> None:
    (found,) = complaints(values, WRITTEN)
    assert found.startswith(complaint)


def test_what_is_right_in_other_ways_passes() -> None:
    for values in (
        *(
            {theirs: WRITTEN["properties"][ours]["default"]}
            for theirs, ours in PUBLISHED_NAMES.items()
        ),
        *({"method": method} for method in METHODS),
        {"reset_optimizer": True, "val_path": None, "load_model_path": "None", "lr": 1},
        {"lora": {"targets": "c_attn", "quantize": None}},
        {"generate": {"task": "hops", "hops": [3, 4], "fresh": True}},
        {"generate": {"nodes": 12}},
    ):
        assert complaints(values, WRITTEN) == []


def test_every_key_is_explained_and_has_its_default() -> None:
    for name, rules in WRITTEN["properties"].items():
        assert rules["description"] and ("default" in rules or name in PUBLISHED_NAMES)
