"""mlx_lm's models: built from a config.json, looked over, and made ready to be borrowed."""

import importlib
import inspect
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from coconut.blocks import first_line
from coconut.checkpoints.verdict import check_borrowed
from coconut.errors import UserError
from mlx_coconut.models.borrowed import Borrowed
from mlx_coconut.models.stand_ins import Behind, LayerCache, Rotary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Naming:
    """Names of a borrowed model's tensors: those of Hugging Face, which its library keeps."""

    VOCABULARY_ROWS = (EMBEDDING, HEAD)
    """Tensors with a row a token; a tied head has none of its own."""

    def __init__(self, model, where: str):
        self._model, self._where = model, where

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face names -> ours; applied twice equals applied once.

        Raises UserError where mlx_lm renames or reshapes what it reads: it could not be written
        back.
        """
        own = dict(weights)
        if not hasattr(self._model, "sanitize") or EMBEDDING not in own:
            return own  # moments of an adapter's
        theirs = self._model.sanitize({HEAD: own[EMBEDDING]} | own)
        theirs.pop(HEAD, None)
        changed = [n for n, w in own.items() if n != HEAD and theirs.pop(n, None) is not w]
        if changed or theirs:
            raise UserError(
                self._where,
                f"{[*changed, *theirs][0]}: mlx_lm changes the tensors of a"
                f" {self._model.model_type} when it reads them, so they could not be written back;"
                " not supported",
            )
        return own

    def to_hf(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Our names -> Hugging Face names: the same."""
        return weights


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its names) for the config.json of an architecture that is not hand-written.

    Raises UserError if mlx_lm does not have it, or if it cannot be taken apart.
    """
    arch = _architecture(config["model_type"], where)
    try:
        check_borrowed(config, [f.name for f in fields(arch.ModelArgs)], where)
        kind = type("Model", (Borrowed, arch.Model), {})
        model = kind(arch.ModelArgs.from_dict(config))
        model.feedback = None  # ĥ itself; feedback.py puts other rules here
        tied = config["tie_word_embeddings"]
        if tied and "lm_head" in model:
            model.sanitize({})  # Gemma 3 has a head until it is shown a file without
        problem = _problem(model, tied)
        if problem is None:
            _find_ropes(model)
            problem = _find_factor(model)
    except UserError:
        raise
    # Whatever a wrong field makes the library stumble over.
    except Exception as error:
        raise UserError(
            where,
            f"not a {config['model_type']} configuration that mlx_lm can use: {first_line(error)}",
        ) from None
    if problem:
        raise UserError(where, f"model_type {config['model_type']!r}: {problem}; not supported")
    return model, Naming(model, where)


def _architecture(model_type: str, where: str):
    """mlx_lm's module of a model_type. Raises UserError if there is none."""
    import mlx_lm.utils  # takes seconds: it opens transformers

    name = mlx_lm.utils.MODEL_REMAPPING.get(model_type, model_type)
    try:
        arch = importlib.import_module(f"mlx_lm.models.{name}")
        assert hasattr(arch, "Model") and hasattr(arch, "ModelArgs")
    except (ImportError, AssertionError, SystemExit):
        raise UserError(
            where,
            f"model_type {model_type!r} is neither hand-written here (gpt2, qwen2) nor one of"
            f" mlx_lm {mlx_lm.__version__}",
        ) from None
    return arch


def _problem(model, tied: bool) -> str | None:
    """What of a model's build the verbs cannot deal with."""
    inner = model.get("model")
    if not all(name in (inner or {}) for name in ("embed_tokens", "layers", "norm")):
        return "its blocks are not where Llama keeps them (model.embed_tokens, layers, norm)"
    if set(model.children()) - {"model", "lm_head"}:
        return "it has parts besides its blocks and its head"
    if tied == ("lm_head" in model):
        return f"mlx_lm does not build it with tie_word_embeddings {tied}"
    if "bias" in model.get("lm_head", {}):
        return "its head has a bias"
    names = [n for n, _ in tree_flatten(inner.parameters())]
    stray = [n for n in names if n.split(".")[0] not in ("embed_tokens", "layers", "norm")]
    if stray:
        return f"it has weights of its own beside its blocks ({stray[0]})"
    odd = [n for n, w in tree_flatten(inner.layers[0].parameters()) if w.ndim > 2]
    return f"a block holds experts or convolutions ({odd[0]})" if odd else None


def _find_ropes(model) -> None:
    """Put `Rotary` around everything in the blocks that turns by an offset."""
    for block in model.layers:
        for path, module in block.named_modules():
            if "offset" in inspect.signature(type(module).__call__).parameters:
                *parents, name = path.split(".")
                parent = block
                for part in parents:
                    parent = parent[part]
                parent[name] = Rotary(module)


def _find_factor(model) -> str | None:
    """Find the factor of the embeddings and whether there are windows; what is odd about them."""
    inner, width = model.model, model.model.norm.weight.shape[0]
    table, seen = inner.embed_tokens, []

    def run(layer: int, block, h: mx.array, mask: mx.array | None) -> mx.array:
        if layer == 0:
            seen.append(h)
        return h

    probe = np.random.default_rng(0).standard_normal((1, 2, width)).astype(np.float32)
    probe[0, 0] = 1
    x, cache = mx.array(probe), LayerCache(None, 0, mx.array([[0, 1]]))
    inner["embed_tokens"] = Behind(table, x)
    try:
        model.run_inner(run, cache, (1, 2))
    finally:
        inner["embed_tokens"] = table
    factor = seen[0][0, 0, 0].item()
    if not mx.allclose(seen[0], x * factor, rtol=1e-5, atol=0).item():
        return "its embeddings pass through more than a factor before the first block"
    model.scale = factor
    model.has_window = bool(cache.windows - {None})
    return None
