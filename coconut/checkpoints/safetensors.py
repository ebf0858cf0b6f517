"""Safetensors files on the host: the header, checked before a number is read, and the numbers.

Numbers are never changed: bfloat16, which numpy does not have, is carried as its 16 bits.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from coconut.errors import UserError, shown, some
from coconut.files import is_file_name, without_repetition


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file; start and stop are byte offsets into the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Tensor(NamedTuple):
    """One tensor: dtype by its safetensors name; data as numpy, BF16 as uint16."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the data."""
        return self.data.shape

    def turned(self) -> "Tensor":
        """The transposed matrix."""
        return Tensor(self.dtype, self.data.T)

    def is_same(self, other: Self) -> bool:
        """Whether type, shape and every bit agree."""
        if self.dtype != other.dtype or self.shape != other.shape:
            return False
        mine, theirs = (np.ascontiguousarray(t.data).view(np.uint8) for t in (self, other))
        return bool(np.array_equal(mine, theirs))

    def float32(self) -> np.ndarray:
        """The numbers as float32, exactly but for F64: BF16 is the upper half of one."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # found with what else is not finite
            return np.ascontiguousarray(self.data, np.float32)


MOST_AXES = 32
"""Of a tensor: what every numpy takes."""
_LONGEST_HEADER = 100_000_000  # the format's own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_NUMPY = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2"},
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped, not read. Raises UserError if it is damaged."""
    entries = safetensors_header(path)
    unknown = [f"{shown(n)}: type {e.dtype}" for n, e in entries.items() if e.dtype not in _NUMPY]
    if unknown:
        raise UserError(str(path), *some(unknown))
    n_bytes = sum(entry.stop - entry.start for entry in entries.values())
    offset = path.stat().st_size - n_bytes
    content = np.zeros(0, np.uint8)
    if n_bytes:
        content = np.memmap(path, np.uint8, "r", offset)
    return {
        name: Tensor(e.dtype, content[e.start : e.stop].view(_NUMPY[e.dtype]).reshape(e.shape))
        for name, e in entries.items()
    }


def check_one_set(single: Path, index: Path, shards: Sequence[Path]) -> None:
    """Raise UserError unless a file and the shards of an index beside it hold the same, to the bit.

    transformers would read the single file, which may be the newer one or what was left behind.
    """
    if gone := [path.name for path in shards if not path.exists()]:
        raise UserError(
            str(index),
            f"names {gone[0]}, which is gone; {single.name} beside it is whole: remove this index",
        )
    ours, theirs = (
        {name: t for path in paths for name, t in read_safetensors(path).items()}
        for paths in ([single], shards)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not ours[name].is_same(theirs[name]):
            raise UserError(
                str(single.parent),
                f"two sets of weights, which differ in {shown(name)}: {single.name}, which"
                f" transformers reads, and the files of {index.name}; remove the wrong one",
            )


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
