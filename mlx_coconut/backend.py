"""The back end in MLX: what coconut/backend.py cannot do without its arrays."""

import mlx.core as mx

from coconut import backend as shared
from coconut.checkpoints.adapters import vocabulary
from coconut.checkpoints.source import Source
from coconut.config.keys import RunConfig
from coconut.world import World
from mlx_coconut import blas, models
from mlx_coconut.models import adapters, arrays, weights
from mlx_coconut.thoughts import feedback, generate, latent, look_inside
from mlx_coconut.updates import latro, train


class Backend(shared.Backend):
    """A model in MLX with its optimizer. See coconut/backend.py for what it answers."""

    name = "mlx_coconut"
    twin = shared.Twin(
        models, weights, adapters, arrays, feedback, latent, generate, look_inside, train, latro
    )

    def __init__(self, config: RunConfig, source: Source, world: World | None = None):
        self.device = "cpu" if mx.default_device() == mx.cpu else mx.device_info()["device_name"]
        self.note = blas.STATUS
        super().__init__(config, source, world)

    def _grow(self, source: Source, seed: int) -> None:
        if not self.config.get("quantization"):
            super()._grow(source, seed)
            return
        n = max(source.vocab_size, self.config["vocab_size"])
        rows = (n, source.copy_from, source.new_tokens, seed)
        for path in vocabulary(self.config):
            adapters.grow_quantized(self.model, path, *rows)
        self.config["vocab_size"] = n

    def memory(self) -> int:
        """Peak bytes of MLX's arrays since the last call."""
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak
