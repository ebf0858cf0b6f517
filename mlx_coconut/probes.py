"""Small computations whose right results are known, for `mac-check`."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from coconut.batches.batch import Batch
from mlx_coconut.models.weights import load_model, to_numpy
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import latent_forward
from mlx_coconut.updates.train import Trainer


def product_error(size: int = 512) -> float:
    """Largest error of a float32 product (size, size), over the spread of its entries.

    float32 gives 1e-6, TF32 1e-3.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, size, size)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.abs(np.array(mx.array(a) @ mx.array(b)) - exact).max() / exact.std())


def wrong_bias_gradients(n: int = 2000) -> int:
    """How many of n gradients of LayerNorm's bias differ from the sum that they are.

    Before MLX 0.32.2 a race on Metal overwrote now and then what was being summed
    (ml-explore/mlx#3630): it needs a cotangent that nobody else holds, as here.
    """
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 64, 256)).astype(np.float32)
    weight, bias = mx.ones(256), mx.zeros(256)
    exact = g.sum(axis=0, dtype=np.float64)

    def loss(bias: mx.array, x: mx.array, g: mx.array) -> mx.array:
        return (mx.fast.layer_norm(x, weight, bias, 1e-5) * g).sum()

    found = [mx.grad(loss)(bias, mx.array(x), mx.array(g)) for _ in range(n)]
    return sum(bool(np.abs(np.array(b) - exact).max() > 1e-3) for b in found)


def run_model(directory: Path, batch: Batch) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """A batch's logits (B, T, V), mean loss without dropout, its gradient by Hugging Face name."""
    model, module, _ = load_model(directory)
    out = latent_forward(model, Inputs.of(batch), batch.first_latent, batch.n_passes)
    logits = np.array(model.head(out.hidden))
    trainer = Trainer(model, weight_decay=0.0)
    loss = trainer.loss(batch).loss_sum / batch.n_targets
    trainer.step([batch], 0.0, (0,))
    # A first step leaves a tenth of the gradient in AdamW's first moment.
    state = dict(tree_flatten(trainer.optimizer.state))
    moments = {n[:-2]: m * 10 for n, m in state.items() if n.endswith(".m")}
    return logits, loss, to_numpy(module.to_hf(moments))


def versions() -> dict[str, Any]:
    """What MLX says of the machine and of itself."""
    return {"mlx": mx.__version__, "device": str(mx.default_device())} | mx.device_info()
