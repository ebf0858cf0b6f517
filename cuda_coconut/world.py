"""Several processes: bytes for the loop, sums for the gradients."""

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from coconut.errors import UserError
from coconut.world import World

_PATIENCE = timedelta(days=1)
"""How long one may wait for another: the first may be making data or downloading a model. A
process that died is noticed at once."""


class Processes(World):
    """The processes that a launcher started together."""

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available() and os.environ.get("COCONUT_DEVICE") != "cpu"
        if on_gpu:
            local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= n_gpus:
                raise UserError(
                    "torchrun", f"process {local} has no GPU: --nproc_per_node {n_gpus} at most"
                )
            torch.cuda.set_device(local)
        # The loop's bytes go through the host even where gradients go from GPU to GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, own: bytes) -> list[bytes]:
        """The bytes of every process, in order of rank."""
        lengths = self._rows(np.array([len(own)], np.int32))[:, 0].tolist()
        padded = np.zeros(max(*lengths, 1), np.uint8)
        padded[: len(own)] = np.frombuffer(own, np.uint8)
        rows = self._rows(padded)
        return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]

    def sum(self, arrays: Any) -> Any:
        """The sums over all processes of a back end's arrays.

        arrays: a tensor, which becomes its sum.
        """
        dist.all_reduce(arrays)
        return arrays

    def close(self) -> None:
        """Leave the others."""
        dist.destroy_process_group()

    def _rows(self, array: np.ndarray) -> np.ndarray:
        rows = [torch.empty_like(torch.from_numpy(array)) for _ in range(self.size)]
        dist.all_gather(rows, torch.from_numpy(array))
        return torch.stack(rows).numpy()
