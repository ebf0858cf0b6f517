"""Tensors on the host: safetensors in and out, torch files through the weights-only reader.

Numbers are never changed: bfloat16, which numpy does not have, is carried as its 16 bits.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from coconut.checkpoints.checkpoint import WEIGHTS, WEIGHTS_INDEX
from coconut.checkpoints.safetensors import MOST_AXES, safetensors_header
from coconut.errors import UserError

SHARD_BYTES = 5 * 2**30
WEIGHT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types a weight may have, by safetensors name."""

_NUMPY = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2"},
}
_TORCH = {
    **{"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16"},
    **{"torch.bfloat16": "BF16", "torch.bool": "BOOL", "torch.int64": "I64", "torch.int32": "I32"},
    **{"torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8"},
}


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
        """The numbers as float32, exactly: BF16 is the upper half of one."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(self.data, np.float32)


def shown(name: object) -> str:
    """A name from a foreign file, safe to print in one line."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


def some(lines: Iterable[str], most: int = 8) -> list[str]:
    """The first of many lines, and how many more there are."""
    lines = list(lines)
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def read_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    """(tensors, whether torch wrote them) of a file, recognised by its first bytes.

    Raises UserError: neither safetensors nor a torch file, damaged, or holding more than tensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return read_safetensors(path), False
    # Zip is torch's format, a bare pickle its format before version 1.6.
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return read_torch(path), True
    raise UserError(
        str(path), "neither safetensors nor a torch file (by its first bytes); is it the right one?"
    )


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


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, through the weights-only reader: nothing else is unpickled.

    Raises UserError: damaged, anything but tensors inside, or torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            str(path), "reading a torch file needs torch: pip install torch (its CPU build is fine)"
        ) from None
    try:
        # torch stores without compression; a compressed file may unfold to any size.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type for info in archive.infolist()):
                    raise UserError(str(path), "a compressed zip, which torch does not write")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd pickles it warns before it refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" (it names {found[1]})" if found else ""
        raise UserError(
            str(path),
            f"refused by torch's weights-only reader{what}: damaged, or it holds objects besides"
            " tensors; save the model's state_dict() alone",
        ) from None
    # The reader raises whatever a damaged file makes it stumble over.
    except Exception as error:
        reason = shown((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(
            str(path), f"truncated or damaged, torch cannot read it: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(str(path), f"holds a {type(content).__name__}, expected a state dict")
    problems, tensors = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{shown(name)}: a {type(value).__name__}, expected a tensor")
        elif value.layout != torch.strided or str(value.dtype) not in _TORCH or value.is_quantized:
            problems.append(f"{shown(name)}: a {value.dtype} tensor of a kind that is not read")
        elif value.ndim > MOST_AXES:
            problems.append(f"{shown(name)}: {value.ndim} axes, at most {MOST_AXES}")
        # A few bytes repeated by their strides could stand for any size.
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            problems.append(f"{shown(name)}: its shape is larger than its data")
        else:
            tensors[name] = _from_torch(value)
    if problems:
        raise UserError(str(path), *some(problems))
    return tensors


def _from_torch(value: Any) -> Tensor:
    import torch

    dtype = _TORCH[str(value.dtype)]
    value = value.detach().contiguous()
    if dtype == "BF16":
        return Tensor(dtype, value.view(torch.int16).numpy().view(np.uint16))
    return Tensor(dtype, value.numpy())


def to_torch(tensor: Tensor) -> Any:
    """The same numbers as a torch tensor of the same type, in memory of its own."""
    import torch

    data = np.array(tensor.data, order="C")
    if tensor.dtype == "BF16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, a tensor at a time."""
    # Wider types first, so that each tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: -tensors[name].data.itemsize)
    # transformers refuses files that do not say which framework's layout they hold.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stop = start + tensors[name].data.nbytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name].data).data)


def write_weights(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, or shards with an index above 5 GB."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.data.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.data.nbytes
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.data.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1))
