"""The keys under `lora`: an adapter, and the bits of a quantised base."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from coconut.config.values import _convert, _nearest, _word, key

ADAPTERS = ("lora", "dora")
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
"""What a base may be quantised to: bits a weight, and weights that share a scale."""


@dataclass(frozen=True)
class Lora:
    """The keys under `lora`: what is trained beside a frozen base."""

    type: str = key("lora", "lora, or dora: with a learned length of every row", choices=ADAPTERS)
    rank: int = key(8, "columns of the two factors", low=1)
    scale: float = key(2.0, "factor of the update; alpha / rank in other programs", low=0)
    alpha: float | None = key(None, "sets scale to alpha / rank", low=0)
    dropout: float = key(0.0, "dropout on what the factors read", low=0)
    targets: list[str] = key(["all"], "linear layers, by name (q_proj, mlp.c_fc), or all")
    layers: int | None = key(None, "only the last so many blocks; all if none", low=1)
    quantize: int | None = key(None, "bits of the frozen base, 4 or 8; MLX only")
    group_size: int = key(64, "weights that share a scale of a quantised base: 32, 64 or 128")


def _lora(values: Mapping[str, Any]) -> tuple[Lora, list[str]]:
    """The keys under `lora` as far as they are right, and what is wrong with the others."""
    known = {f.name: f for f in fields(Lora)}
    hints, found, problems = typing.get_type_hints(Lora), {}, []
    for name, value in values.items():
        if name not in known:
            advice = _nearest(name, known) or f"known: {', '.join(known)}"
            problems.append(f"lora.{_word(name)}: unknown key, {advice}")
            continue
        if name == "targets" and isinstance(value, str):
            value = [value]
        try:
            found[name] = _convert(name, value, hints[name], known[name].metadata)
        except ValueError as error:
            problems.append(f"lora.{name}: {error}")
    lora = Lora(**found)
    if lora.alpha is not None:
        if "scale" in found and lora.scale != lora.alpha / lora.rank:
            problems.append("lora.alpha: sets scale to alpha / rank, and scale says otherwise")
        lora = replace(lora, scale=lora.alpha / lora.rank, alpha=None)
    return lora, problems


def lora_of(values: Mapping[str, Any]) -> Lora:
    """A Lora from what `dataclasses.asdict` made of one. Raises ValueError for anything else."""
    lora, problems = _lora(values)
    if problems:
        raise ValueError("; ".join(problems))
    return lora
