"""The keys under `lora`: an adapter, and the bits of a quantised base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coconut.config.values import key, read_keys, word

_key = partial(key, group="lora")


@dataclass(frozen=True)
class Lora:
    """The keys under `lora`: what is trained beside a frozen base."""

    type: str = _key(
        "lora", "lora, or dora: with a learned length of every row", choices=("lora", "dora")
    )
    rank: int = _key(8, "columns of the two factors", low=1)
    scale: float = _key(
        2.0, "factor of the update, 0 would train nothing; alpha / rank in other programs", above=0
    )
    alpha: float | None = _key(None, "sets scale to alpha / rank", above=0)
    dropout: float = _key(0.0, "dropout on what the factors read", low=0, below=1)
    targets: list[str] = _key(["all"], "linear layers, by name (q_proj, mlp.c_fc), or all")
    layers: int | None = _key(None, "only the last so many blocks; all if none", low=1)
    quantize: int | None = _key(
        None, "bits of the frozen base; MLX only", choices=(4, 8), complaint="expected 4 or 8 bits"
    )
    group_size: int = _key(64, "weights that share a quantised base's scale", choices=(32, 64, 128))


def read_lora(values: Mapping[str, Any]) -> tuple[Lora, list[str]]:
    """The keys under `lora` as far as they are right, and what is wrong with the others."""
    found, wrong = read_keys(Lora, values)
    problems = [f"lora.{word(name)}: {text}" for name, text in wrong.items()]
    lora = Lora(**found)
    if lora.alpha is not None:
        if "scale" in found and lora.scale != lora.alpha / lora.rank:
            problems.append("lora.alpha: sets scale to alpha / rank, and scale says otherwise")
        lora = replace(lora, scale=lora.alpha / lora.rank, alpha=None)
    return lora, problems


def lora_of(values: Mapping[str, Any]) -> Lora:
    """A Lora from what `dataclasses.asdict` made of one. Raises ValueError for anything else."""
    lora, problems = read_lora(values)
    if problems:
        raise ValueError("; ".join(problems))
    return lora
