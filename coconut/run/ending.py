"""The end of a run: what its summary says it was measured with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.backend import Backend
from coconut.files import sha256


def measured_with(twin: str, backend: Backend, data: str) -> dict[str, str]:
    """What a summary says of the machine it was made on, and of the file of its questions."""
    return {
        "backend": twin,
        "device": backend.device,
        "dtype": backend.dtype,
        "data": data,
        "data_sha256": sha256(Path(data)),
    }
