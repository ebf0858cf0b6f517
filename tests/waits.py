"""What would make the host wait for a GPU, told on any machine by the operators that are called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

TO_PYTHON = ("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__")
WAITING = {
    "_local_scalar_dense",  # item
    "lift_fresh",  # torch.tensor: a copy out of memory that is not pinned
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
    "_linalg_check_errors",
    "repeat_interleave",
}
"""Operators whose result, or its shape, the host must have before it can go on."""


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU, and how much is computed after the first.

    Inside, tensors lie on the CPU; what tells is the operator, or the method that leaves tensors.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.found: list[str] = []
        self.computed_after: list[str] = []
        for name in TO_PYTHON:
            patch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))
        from_numpy = torch.from_numpy

        def copied(array: np.ndarray) -> torch.Tensor:
            # `to_device` is the one way over that does not wait.
            if sys._getframe(1).f_code.co_name != "to_device":
                self.found.append("from_numpy")
            with _disable_current_modes():
                return from_numpy(array)

        patch.setattr(torch, "from_numpy", copied)

    def _noting(self, name: str, method: Callable) -> Callable:
        def noted(tensor: torch.Tensor, *args: Any) -> Any:
            self.found.append(name)
            return method(tensor, *args)

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.found.append(name)
        elif name.startswith(("index", "_index")) and self._has_bools(args[1]):
            self.found.append(f"{name} by a mask")
        elif self.found and name not in ("detach", "alias"):
            self.computed_after.append(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _has_bools(indices: Any) -> bool:
        indices = indices if isinstance(indices, list | tuple) else ()
        return any(torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in indices)
