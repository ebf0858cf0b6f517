"""What a checkpoint's tensors should be: shapes from a config.json, a config.json from shapes."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from coconut.checkpoints.architectures import GPT2, is_borrowed
from coconut.checkpoints.model_args import PUBLISHED_SHAPES, Shapes
from coconut.checkpoints.verdict import args_of
from coconut.errors import UserError

TWINS = {"torch": "cuda_coconut", "mlx": "mlx_coconut"}
"""Framework -> the twin that is written in it."""


def shapes_of(config: Mapping[str, Any], where: str) -> Shapes:
    """Every tensor of a model by its hub name, from a config.json that was judged."""
    return _borrowed_shapes(config, where) if is_borrowed(config) else args_of(config).shapes()


def _borrowed_shapes(config: Mapping[str, Any], where: str) -> Shapes:
    """What the library that a twin borrows the model from builds."""
    twin = next((t for t in reversed(TWINS) if importlib.util.find_spec(t)), None)
    if twin is None:
        raise UserError(where, "needs mlx or torch to know this model: pip install one of them")
    models, weights = (
        importlib.import_module(f"{TWINS[twin]}.{n}") for n in ("models", "models.weights")
    )
    model, module = models.build(dict(config), where)
    return {n: tuple(w.shape) for n, w in weights.hf_weights(model, module).items()}


def gpt2_config(
    shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, Any], list[str]]:
    """(config.json, what was inferred) of a bare GPT-2 state dict.

    shapes: by hub name. Heads leave no trace in them, so only a published GPT-2's are known.
    Raises UserError where shapes do not say.
    """
    try:
        (rows, width), (n_positions, _) = shapes["wte.weight"], shapes["wpe.weight"]
        (inner,) = shapes["h.0.mlp.c_fc.bias"]
    except (KeyError, ValueError):
        raise UserError(
            where,
            "wte.weight, wpe.weight and h.0.mlp.c_fc.bias do not have the shapes of a GPT-2;"
            " if it is one, give its config.json with --config",
        ) from None
    found = {"n_embd": width, "n_layer": GPT2.n_layers(shapes), "n_positions": n_positions}
    heads = [c["n_head"] for c in PUBLISHED_SHAPES.values() if {n: c[n] for n in found} == found]
    if not heads or inner != 4 * width:
        raise UserError(
            where,
            f"{found['n_layer']} layers of width {width} and {n_positions} positions are no"
            " published GPT-2, and a state dict does not say its heads; give its config.json with"
            " --config",
        )
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": rows,
        **found,
        "n_head": heads[0],
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }
    inferred = [f"{n} {config[n]}" for n in ("n_layer", "n_embd", "n_positions", "vocab_size")]
    inferred.append(f"n_head {config['n_head']}")
    return config, inferred
