"""Low-rank adapters beside frozen weights: mlx_lm's layers in our models, their files, fusing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from coconut.blocks import Draw
from coconut.checkpoints import adapter_files
from coconut.checkpoints import adapters as files
from coconut.checkpoints.adapters import Adapter
from coconut.checkpoints.checkpoint import ADAPTERS
from coconut.checkpoints.initial import grown_rows
from coconut.feedback.weights import RULE_PREFIX
from coconut.files import write_json
from mlx_coconut.models.base import dropout
from mlx_coconut.models.weights import (
    check_finite,
    from_numpy,
    read_tensors,
    to_numpy,
    trained_weights,
    write_tensors,
)

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class RowsEmbedding(nn.Module):
    """A frozen embedding, or a head of its own, of which some rows are trained.

    base (V, D); tokens: whose rows; rows (n, D) stand in their place.
    """

    def __init__(self, base, tokens: tuple[int, ...], rows: mx.array):
        super().__init__()
        self.base, self.rows = base, rows
        self._tokens = mx.array(tokens)

    def __call__(self, x: mx.array) -> mx.array:
        """ids (B, T) -> (B, T, D); of a head states (..., D) -> logits (..., V)."""
        if not mx.issubdtype(x.dtype, mx.integer):
            return self.as_linear(x)
        out = self.base(x)
        chosen = (x[..., None] == self._tokens).astype(out.dtype)
        return out * (1 - chosen.sum(axis=-1, keepdims=True)) + chosen @ self.rows

    @property
    def weight(self) -> mx.array:
        """All rows (V, D), the trained ones in their places."""
        w = _dense(self.base)
        return w.at[self._tokens].add(self.rows - w[self._tokens])

    def as_linear(self, x: mx.array) -> mx.array:
        """States (..., D) -> logits (..., V)."""
        is_embedding = hasattr(self.base, "as_linear")
        logits = self.base.as_linear(x) if is_embedding else self.base(x)
        own = x @ self.rows.T
        where = mx.broadcast_to(self._tokens, own.shape)
        return mx.put_along_axis(logits, where, own, axis=-1)


class InputDropout(nn.Module):
    """Dropout on what an adapter reads, by the block's key: recomputed, it drops the same."""

    def __init__(self, rate: float, number: int, draw: Draw):
        super().__init__()
        self._rate, self._number, self._draw = rate, number, draw

    def __call__(self, x: mx.array) -> mx.array:
        """x of any shape, as it is where no key is set."""
        key = self._draw.key
        # Beyond the few keys that a block splits off for itself.
        return dropout(
            x, self._rate, None if key is None else mx.random.split(key, 64)[-self._number]
        )


def adapt(model, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Freeze the model, quantise it if asked, and put fresh adapters and trained rows into it."""
    from mlx_lm.tuner.utils import linear_to_lora_layers  # takes seconds: it opens transformers

    lora = adapter.lora
    layers = files.adapted_layers(config, lora)
    if lora.quantize is not None:
        quantize(model, lora.quantize, lora.group_size)
    model.freeze()
    keys = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0}
    linear_to_lora_layers(
        model,
        lora.layers or files.n_layers(config),
        keys | {"keys": set(files.targets(config, lora))},
        use_dora=lora.type == "dora",
    )
    draw = Draw()
    if lora.dropout and hasattr(model, "draw"):
        model.draw = draw  # a borrowed model's blocks are not given the key
    elif lora.dropout:
        for block in model.layers:
            _hand_over_key(block, draw)
    for number, path in enumerate(layers):
        layer = _find(model, path)
        if lora.dropout:
            layer.dropout = InputDropout(
                lora.dropout, number % len(files.linear_layers(config)) + 1, draw
            )
    for path in files.vocabulary(config) if adapter.rows else ():
        base = _find(model, path)
        rows = _dense(base)[mx.array(adapter.rows)]
        _put(model, path, RowsEmbedding(base, adapter.rows, rows))
    shapes = files.trained_shapes(config, lora, len(adapter.rows))
    fresh = {n: s for n, s in shapes.items() if n.endswith((".lora_a", ".lora_b"))}
    drawn = {n: files.initial_factor(n, s, adapter.seed) for n, s in fresh.items()}
    model.update(tree_unflatten(list(from_numpy(drawn).items())))
    mx.eval(model.parameters())


def _hand_over_key(block: nn.Module, draw: Draw) -> None:
    """Let the adapters in a block know its dropout key, as one of torch's hooks would."""

    class Drawing(type(block)):
        def __call__(self, x, mask, cache, layer, key, *shared):
            draw.key = key
            return super().__call__(x, mask, cache, layer, key, *shared)

    block.__class__ = Drawing


def quantize(model, bits: int, group_size: int) -> None:
    """Quantise the linear layers and the token embedding; positions stay as they are."""
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and path != "wpe",
    )


def grow_quantized(model, path: str, n_rows: int, copy_from: int | None, new: range, seed: int):
    """Give a quantised embedding or head more rows, or new ones; the others stay bit for bit."""
    module = _find(model, path)
    old = np.array(_dense(module))
    grown = grown_rows(old, n_rows, copy_from, new, seed)
    changed = sorted({*range(len(old), len(grown)), *new})
    parts = mx.quantize(mx.array(grown[changed]), module.group_size, module.bits, mode=module.mode)
    for name, part in zip(("weight", "scales", "biases"), parts, strict=True):
        array = module[name]
        room = mx.zeros((len(grown) - len(old), array.shape[1]), array.dtype)
        array = mx.concatenate([array, room])
        array[mx.array(changed)] = part
        module[name] = array


@contextmanager
def disabled(model) -> Iterator[None]:
    """The frozen base alone: adapters and trained rows stand aside."""
    aside = {name: m for name, m in model.named_modules() if _inner(m) is not None}
    for name, module in aside.items():
        _put(model, name, _inner(module))
    try:
        yield
    finally:
        for name, module in aside.items():
            _put(model, name, module)


def fused(model) -> dict[str, mx.array]:
    """Float weights of a plain model that computes what this one does, under its own names."""
    weights: dict[str, mx.array] = {}
    for name, module in model.named_modules():
        path = ".".join(part for part in name.split(".") if part not in ("linear", "base"))
        if "lora_a" in module:
            whole = module.fuse(dequantize=True)
            weights.update({f"{path}.{n}": w for n, w in tree_flatten(whole.parameters())})
        elif isinstance(module, RowsEmbedding):
            weights[f"{path}.weight"] = module.weight
        elif isinstance(module, QUANTIZED):
            weights.setdefault(f"{path}.weight", _dense(module))
            if "bias" in module:
                weights.setdefault(f"{path}.bias", module.bias)
    for name, w in tree_flatten(model.parameters()):
        parts = [part for part in name.split(".") if part not in ("linear", "base")]
        is_own = parts[-1] not in (*files.LEAVES, "rows", "scales", "biases")
        if is_own and not name.startswith(RULE_PREFIX):
            weights.setdefault(".".join(parts), w)
    return weights


def save(model, config: Mapping[str, Any], adapter: Adapter, directory: Path) -> None:
    """Write the adapter's files; see coconut/checkpoints/adapters.py."""
    own = to_hf(trained_weights(model))
    trained = to_numpy({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})
    paths = files.vocabulary(config) if adapter.rows else ()
    base = to_numpy({path: _dense(_find(model, path).base) for path in paths})
    _, whole = adapter_files.split_trained(trained)
    factors = adapter_files.to_mlx_lm(adapter, trained, base)
    write_tensors(directory / ADAPTERS, from_numpy(factors))
    write_tensors(directory / files.TRAINED, from_numpy(whole))
    write_json(directory / files.ADAPTER_CONFIG, adapter_files.adapter_config(adapter, config))


def load(model, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Put the trained values of an adapter's directory into a model that `adapt` prepared."""
    assert adapter.directory is not None, "an adapter that begins has no files"
    arrays = adapter_files.from_mlx_lm(adapter, config, read_tensors(adapter.directory / ADAPTERS))
    arrays |= read_tensors(adapter.directory / files.TRAINED)
    adapter_files.check_arrays({n: w.shape for n, w in arrays.items()}, config, adapter)
    check_finite(arrays, str(adapter.directory))
    model.update(tree_unflatten([(n, w.astype(mx.float32)) for n, w in arrays.items()]))
    mx.eval(model.parameters())


def to_hf(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Names and layout of trained arrays here -> those of the files."""
    return weights


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Names and layout of trained arrays in the files -> those here."""
    return weights


def n_numbers(model) -> int:
    """Numbers in a plain model's weights.

    Quantised ones count as what they stand for.
    """
    sizes = {name: w.size for name, w in tree_flatten(model.parameters())}
    for path, module in model.named_modules():
        if isinstance(module, QUANTIZED):
            sizes[f"{path}.weight"] = module.weight.size * 32 // module.bits
            sizes[f"{path}.scales"] = sizes[f"{path}.biases"] = 0
    return sum(sizes.values())


def _inner(module):
    """The frozen module that an adapter or trained rows stand around; None for any other."""
    if "lora_a" in module:
        return module.linear
    return module.base if isinstance(module, RowsEmbedding) else None


def _dense(module) -> mx.array:
    """Weight of a linear layer or embedding, dequantised if need be."""
    if not isinstance(module, QUANTIZED):
        return module.weight
    parts = (module.weight, module.scales, module.get("biases"))
    return mx.dequantize(*parts, module.group_size, module.bits, mode=module.mode)


def _find(model, path: str):
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else getattr(model, part)
    return model


def _put(model, path: str, module) -> None:
    *parents, name = path.split(".")
    setattr(_find(model, ".".join(parents)) if parents else model, name, module)
