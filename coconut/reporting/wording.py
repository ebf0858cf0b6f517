"""How an event and its values are put in words and figures."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def line_of(kind: str, fields: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if value is not None}
    # "epoch" and "eval " stand in one column; the events of a start need no word before them.
    head = {"train": "epoch", "eval": "eval ", "start": ""}.get(kind, kind)
    if "epoch" in rest:
        head += " " + _of(rest.pop("epoch"), rest.pop("n_epochs", None))
        if "stage" in rest:
            head += f" stage {rest.pop('stage')}"
    elif "path" in rest:
        head += f" {rest.pop('path')}"
    parts = [head] if head else []
    if "step" in rest:
        parts.append(f"step {_of(rest.pop('step'), rest.pop('n_steps', None), width=4)}")
    if "model" in rest:
        n_params = rest.pop("n_params", None)
        size = "" if n_params is None else f" {_count(n_params)} params"
        parts.append(f"{rest.pop('model')}{size}")
        parts = [*map(str, filter(None, [rest.pop("backend", None)])), *parts]
    return " | ".join(parts + [in_words(name, value) for name, value in rest.items()])


def _of(number: int, total: int | None, width: int = 2) -> str:
    width = max(width, len(str(total or "")))
    return f"{number:0{width}d}" + ("" if total is None else f"/{total:0{width}d}")


def in_words(name: str, value: Any) -> str:
    """One field as it stands in a line."""
    if is_share(value):
        n, total = value
        return f"{name} {100 * n / total:.1f}% ({n}/{total})" if total else f"{name} - (0/0)"
    if name in _BARE:
        return str(value)
    if name in _UNITS and isinstance(value, int | float) and math.isfinite(value):
        return _UNITS[name](value)
    return f"{name.replace('_', ' ')} {cell(value)}"


def cell(value: Any) -> str:
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Small numbers, such as a learning rate, would all read 0.0000.
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def are_numbers(column: Sequence[Any]) -> bool:
    """Numbers, written out or not; a cell may be empty."""
    said = [value for value in column if value not in ("", "–")]
    return bool(said) and all(
        isinstance(value, int | float) or bool(_NUMBER.fullmatch(str(value))) for value in said
    )


def is_share(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value)


def _count(number: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes = seconds // 60
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


_UNITS: dict[str, Callable[[Any], str]] = {
    "bytes": _bytes,
    "memory_bytes": _bytes,
    "peak_memory_bytes": lambda value: f"peak {_bytes(value)}",
    "active_memory_bytes": lambda value: f"active {_bytes(value)}",
    "cached_memory_bytes": lambda value: f"cached {_bytes(value)}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "samples_per_second": lambda value: f"{value:,.1f} samples/s",
    "seconds": lambda value: f"{value:.1f} s" if value < 60 else _duration(value),
    "eta_seconds": lambda value: f"eta {_duration(value)}",
    "n_params": lambda value: f"{_count(value)} params",
}
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?%?")
# Values that say themselves what they are.
_BARE = ("message", "backend", "device", "dtype")
