"""Several processes: bytes for the loop, sums for the gradients."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from coconut.world import World


class Processes(World):
    """The processes that a launcher started together."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    def gather(self, own: bytes) -> list[bytes]:
        """The bytes of every process, in order of rank."""
        lengths = self._rows(np.array([len(own)], np.int32))[:, 0].tolist()
        padded = np.zeros(max(*lengths, 1), np.uint8)
        padded[: len(own)] = np.frombuffer(own, np.uint8)
        rows = self._rows(padded)
        return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]

    def sum(self, arrays: Any) -> Any:
        """The sums over all processes of a back end's arrays.

        arrays: a tree of them; the sums are new ones, not evaluated yet.
        """
        # MLX's helper joins small arrays, so that few messages travel.
        means = nn.average_gradients(arrays, self.group)
        return tree_map(lambda mean: mean * self.size, means)

    def _rows(self, array: np.ndarray) -> np.ndarray:
        gathered = mx.distributed.all_gather(mx.array(array)[None], group=self.group)
        return np.array(gathered)
