"""Tensors on the host: safetensors in and out, torch files through the weights-only reader.

Numbers are never changed: bfloat16, which numpy does not have, is carried as its 16 bits.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coconut.checkpoints.checkpoint import WEIGHTS, WEIGHTS_INDEX
from coconut.checkpoints.safetensors import MOST_AXES, Tensor, read_safetensors
from coconut.errors import UserError, shown, some

SHARD_BYTES = 5 * 2**30
NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Where programs that save more than weights keep these."""
_TORCH = {
    **{"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16"},
    **{"torch.bfloat16": "BF16", "torch.bool": "BOOL", "torch.int64": "I64", "torch.int32": "I32"},
    **{"torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8"},
}


def read_file(path: Path) -> tuple[dict[str, Tensor], bool, list[str]]:
    """(tensors, whether torch wrote them, notes) of a file, recognised by its first bytes.

    Raises UserError: neither safetensors nor a torch file, damaged, or holding more than tensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from None
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return read_safetensors(path), False, []
    # Zip is torch's format, a bare pickle its format before version 1.6.
    if start.startswith((b"PK\x03\x04", b"\x80")):
        tensors, notes = read_torch(path)
        return tensors, True, notes
    raise UserError(
        str(path), "neither safetensors nor a torch file (by its first bytes); is it the right one?"
    )


def read_torch(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a torch file, through the weights-only reader: nothing else is unpickled.

    A state dict inside (NESTED) is taken, and what lies beside it noted.
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
    content, notes = _inner(content, torch.Tensor, str(path))
    problems, tensors = [], {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{shown(name)}: a {type(value).__name__}, expected a tensor")
        elif value.layout != torch.strided or str(value.dtype) not in _TORCH or value.is_quantized:
            problems.append(f"{shown(name)}: a {value.dtype} tensor of a kind that is not read")
        elif value.ndim > MOST_AXES:
            problems.append(f"{shown(name)}: {value.ndim} axes, at most {MOST_AXES}")
        elif value.is_meta:
            problems.append(f"{shown(name)}: a shape without numbers (device meta)")
        # A few bytes repeated by their strides could stand for any size.
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            problems.append(f"{shown(name)}: its shape is larger than its data")
        else:
            tensors[name] = _from_torch(value)
    if problems:
        raise UserError(str(path), *some(problems))
    return tensors, notes


def _inner(content: Any, tensor: Any, where: str) -> tuple[Any, list[str]]:
    """(the state dict itself, what was left beside it). Raises UserError if there are several."""
    notes: list[str] = []
    while inside := [name for name in NESTED if isinstance(content.get(name), dict)]:
        chosen = content[inside[0]]
        beside = {name: value for name, value in content.items() if name != inside[0]}
        # Another model (an average of the weights, say) has the same names.
        rivals = [n for n, v in beside.items() if isinstance(v, dict) and v.keys() & chosen.keys()]
        rivals += [n for n, v in beside.items() if isinstance(v, tensor) and v.numel() > 1]
        if rivals:
            raise UserError(
                where,
                f"{inside[0]} and {shown(rivals[0])} both hold weights; save the state dict meant"
                " alone",
            )
        left = f"; left out: {', '.join(map(shown, beside))}" if beside else ""
        notes.append(f"the state dict inside {inside[0]}{left}")
        content = chosen
    return content, notes


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
