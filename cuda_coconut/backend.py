"""The back end in torch: what coconut/backend.py cannot do without its arrays."""

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from coconut import backend as shared
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.world import World, wanted_device
from cuda_coconut import models
from cuda_coconut.models import adapters, arrays, weights
from cuda_coconut.models.cpu import keep_freed_memory
from cuda_coconut.thoughts import feedback, generate, latent, look_inside
from cuda_coconut.updates import latro, train


def start_device(wanted: str | None, tf32: bool) -> bool:
    """Choose the device and how it rounds, before anything is computed.

    wanted: cpu, gpu, None for the library's own choice. Returns whether it is a GPU. Raises
    UserError if there is none.
    """
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("device", "gpu: torch finds none here; use device: cpu")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return wanted != "cpu" and torch.cuda.is_available()


class Backend(shared.Backend):
    """A model in torch with its optimizer. See coconut/backend.py for what it answers."""

    name = "cuda_coconut"
    twin = shared.Twin(
        models, weights, adapters, arrays, feedback, latent, generate, look_inside, train, latro
    )

    def __init__(self, config: RunConfig, source: Source, world: World | None = None):
        self.on_gpu = start_device(wanted_device(config.device), config.tf32)
        self.uses_tf32 = self.on_gpu and config.tf32
        self.device = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.note = f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
        if torch.version.cuda and not torch.cuda.is_available():
            self.note += ": this torch is built for a GPU and sees none"
        super().__init__(config, source, world)

    def _make_trainer(self, config: RunConfig, **options: Any) -> train.Trainer:
        self.model.to("cuda" if self.on_gpu else "cpu")
        if not self.on_gpu:
            keep_freed_memory()
        return super()._make_trainer(config, shard=config.shard, **options)

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, this process holds all weights; every process enters and leaves."""
        return nullcontext() if self.trainer.shards is None else self.trainer.shards.gathered()

    def memory(self) -> dict[str, int]:
        """Bytes of the arrays, as far as they are counted on this device."""
        if not self.on_gpu:  # there torch counts none; the peak is the whole process's so far
            unit = 1 if sys.platform == "darwin" else 1024
            return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        active = torch.cuda.memory_allocated()
        found = {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "active_memory_bytes": active,
            "cached_memory_bytes": torch.cuda.memory_reserved() - active,
        }
        torch.cuda.reset_peak_memory_stats()
        return found
