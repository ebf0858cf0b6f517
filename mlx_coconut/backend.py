"""The back end in MLX: what coconut/backend.py cannot do without its arrays."""

import os

import mlx.core as mx

from coconut import backend as shared
from coconut.checkpoints.adapters import vocabulary
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.world import World, wanted_device
from mlx_coconut import blas, models
from mlx_coconut.models import adapters, arrays, weights
from mlx_coconut.thoughts import feedback, generate, latent, look_inside
from mlx_coconut.updates import latro, train


def start_device(wanted: str | None, tf32: bool) -> bool:
    """Choose the device and how it rounds, before anything is computed.

    wanted: cpu, gpu, None for the library's own choice. Returns whether it is a GPU. Raises
    UserError if there is none.
    """
    if wanted == "gpu" and not mx.is_available(mx.gpu):
        raise UserError("device", "gpu: MLX finds none here; use device: cpu")
    if wanted:
        mx.set_default_device(mx.cpu if wanted == "cpu" else mx.gpu)
    # Read once, at the first product; MLX takes TF32 if nothing is said. What the user set stays.
    os.environ.setdefault("MLX_ENABLE_TF32", str(int(tf32)))
    if mx.default_device() == mx.cpu:
        return False
    if recommended := mx.device_info().get("max_recommended_working_set_size"):
        # Freed arrays are kept for the next ones of their size; a quarter is plenty for few shapes.
        mx.set_cache_limit(recommended // 4)
        # Weights stay in memory between two steps, as mlx-lm has it (macOS 15 and newer).
        mx.set_wired_limit(recommended)
    return True


class Backend(shared.Backend):
    """A model in MLX with its optimizer. See coconut/backend.py for what it answers."""

    name = "mlx_coconut"
    twin = shared.Twin(
        models, weights, adapters, arrays, feedback, latent, generate, look_inside, train, latro
    )

    def __init__(self, config: RunConfig, source: Source, world: World | None = None):
        self.on_gpu = start_device(wanted_device(config.device), config.tf32)
        self.uses_tf32 = self.on_gpu and os.environ["MLX_ENABLE_TF32"] != "0"
        self.device = mx.device_info()["device_name"] if self.on_gpu else "cpu"
        self.note = blas.STATUS
        super().__init__(config, source, world)
        # An array that is not computed yet belongs to the stream of its thread; others ask too.
        mx.eval(self.model.state)

    def _grow(self, source: Source, seed: int) -> None:
        if not self.config.get("quantization"):
            super()._grow(source, seed)
            return
        n = max(source.vocab_size, self.config["vocab_size"])
        rows = (n, source.copy_from, source.new_tokens, seed)
        for path in vocabulary(self.config):
            adapters.grow_quantized(self.model, path, *rows)
        self.config["vocab_size"] = n

    def n_traces(self) -> int:
        """How often a step was traced or compiled."""
        return 0 if "MLX_DISABLE_COMPILE" in os.environ else self.trainer.n_traces

    def memory(self) -> dict[str, int]:
        """Bytes of the arrays, as far as they are counted on this device."""
        found = {
            "peak_memory_bytes": mx.get_peak_memory(),
            "active_memory_bytes": mx.get_active_memory(),
            "cached_memory_bytes": mx.get_cache_memory(),
        }
        mx.reset_peak_memory()
        # What is kept from shapes that are done is given back.
        if self.on_gpu and found["cached_memory_bytes"] > found["active_memory_bytes"]:
            mx.clear_cache()
        return found
