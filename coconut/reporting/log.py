"""log.jsonl: opened so that no torn line stays, and values as JSON has them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coconut.errors import UserError
from coconut.reporting.wording import is_share

LOG = "log.jsonl"


def open_log(path: Path) -> tuple[Any, int]:
    """The log opened for appending, and how many bytes of a torn last line were cut off."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
        file.seek(0)
        content = file.read()
        whole, torn = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        # The line is whole if only its newline is missing; otherwise the kill came while writing.
        if torn and _is_json(torn):
            file.write(b"\n")
            return file, 0
        file.truncate(len(whole))
        return file, len(torn)
    except OSError as error:
        raise UserError(str(path), f"cannot be written: {error.strerror}") from error


def append(file: Any, line: bytes) -> None:
    """Write a line to an open log. Raises UserError if the disk refuses; the rest is torn then."""
    try:
        while line:  # a disk that fills up takes a part of it, without an error
            line = line[file.write(line) :]
    except OSError as error:
        raise UserError(file.name, f"cannot be written: {error.strerror}") from error


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def plain(name: str, value: Any, nonfinite: dict[str, str]) -> Any:
    """The value as JSON has it; what is not finite becomes None and is noted under its name."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()  # a numpy scalar
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_share(value):
        return {"n": value[0], "of": value[1], "share": value[0] / value[1] if value[1] else None}
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", inner, nonfinite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(f"{name}.{i}", inner, nonfinite) for i, inner in enumerate(value)]
    raise TypeError(f"{name}: no JSON form for {type(value).__name__}")
