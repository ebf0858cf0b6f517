"""The header of a safetensors file, checked before a number of it is read."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from coconut.errors import UserError
from coconut.files import is_file_name, without_repetition


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file; start and stop are byte offsets into the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


MOST_AXES = 32
"""Of a tensor: what every numpy takes."""
_LONGEST_HEADER = 100_000_000  # the format's own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Names, types and shapes of a safetensors file, checked against its size.

    The tensors must fill the data part without gap or overlap, so a file cut anywhere is found
    before a framework opens it. Reads the header only. Raises UserError.
    Source: the format's description, 8 bytes of little-endian header length, JSON, data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(
                    str(path), f"truncated or damaged: {size:,} bytes, header of {length:,} bytes"
                )
            header = file.read(length)
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from error
    try:
        content = json.loads(header, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"the header is no safetensors header: {error}") from error
    if not isinstance(content, dict):
        raise UserError(str(path), "the header is no JSON object")
    content.pop("__metadata__", None)
    entries = {name: _tensor_entry(path, name, entry) for name, entry in content.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise UserError(str(path), f"{name}: data begin at {entry.start:,}, expected {end:,}")
        end = entry.stop
    if end != size - 8 - length:
        kind = "truncated" if end > size - 8 - length else "too long"
        raise UserError(
            str(path), f"{kind}: {size:,} bytes, the header describes {8 + length + end:,}"
        )
    return entries


def _is_entry(name: str, entry: object) -> bool:
    # A damaged or hostile list must not lead out of the directory.
    return (
        all(map(is_file_name, name.split("/")))
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
    )


def _tensor_entry(path: Path, name: str, entry: object) -> TensorEntry:
    if isinstance(entry, dict):
        dtype: Any = entry.get("dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        if isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets):
            bits = _BITS.get(dtype)
            if bits is None:
                raise UserError(str(path), f"{name}: type {dtype} is not supported")
            if len(shape) > MOST_AXES:
                raise UserError(str(path), f"{name}: {len(shape)} axes, at most {MOST_AXES}")
            if len(offsets) == 2 and 8 * (offsets[1] - offsets[0]) == bits * math.prod(shape):
                return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    raise UserError(str(path), f"{name}: dtype, shape and data_offsets do not fit together")


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
