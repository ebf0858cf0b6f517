"""Low-rank adapters beside frozen weights: peft's layers in our models, their files, fusing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coconut.blocks import Draw
from coconut.checkpoints import adapter_files
from coconut.checkpoints import adapters as files
from coconut.checkpoints.adapters import Adapter
from coconut.checkpoints.checkpoint import ADAPTERS
from coconut.errors import UserError
from coconut.feedback.weights import RULE_PREFIX
from coconut.files import write_json
from cuda_coconut.models.base import as_linear, dropout
from cuda_coconut.models.weights import (
    check_finite,
    from_numpy,
    read_tensors,
    to_numpy,
    trained_weights,
    write_tensors,
)

LEAVES = {
    "lora_A.default.weight": "lora_a",
    "lora_B.default.weight": "lora_b",
    "lora_magnitude_vector.default.weight": "m",
}
"""peft's names of an adapter's arrays, the factors turned -> the names of the files."""


class RowsEmbedding(nn.Module):
    """A frozen embedding, or a head of its own, of which some rows are trained.

    base (V, D); tokens: whose rows; rows (n, D) stand in their place.
    """

    def __init__(self, base: nn.Module, tokens: tuple[int, ...], rows: torch.Tensor):
        super().__init__()
        self.base, self.rows = base, nn.Parameter(rows)
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)
        self.is_disabled = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> (B, T, D); of a head states (..., D) -> logits (..., V)."""
        if x.is_floating_point():
            return self.as_linear(x)
        out = self.base(x)
        if self.is_disabled:
            return out
        chosen = (x[..., None] == self.tokens).to(out.dtype)
        return out * (1 - chosen.sum(dim=-1, keepdim=True)) + chosen @ self.rows

    @property
    def weight(self) -> torch.Tensor:
        """All rows (V, D), the trained ones in their places."""
        w = self.base.weight
        return w if self.is_disabled else w.index_copy(0, self.tokens, self.rows)

    def as_linear(self, x: torch.Tensor) -> torch.Tensor:
        """States (..., D) -> logits (..., V)."""
        logits = as_linear(self.base, x)
        if self.is_disabled:
            return logits
        own = nn.functional.linear(x, self.rows)
        return logits.index_copy(-1, self.tokens, own.to(logits.dtype))


class InputDropout(nn.Module):
    """Dropout on what an adapter reads, by the block's key: recomputed, it drops the same."""

    def __init__(self, rate: float, number: int, draw: Draw):
        super().__init__()
        self._rate, self._number, self._draw = rate, number, draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape, as it is where no key is set."""
        key = self._draw.key
        # Beyond the few keys that a block splits off for itself.
        return dropout(x, self._rate, None if key is None else (*key, 64 - self._number))


def adapt(model, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Freeze the model, quantise it if asked, and put fresh adapters and trained rows into it."""
    lora = adapter.lora
    layers = files.adapted_layers(config, lora)
    files.check_twin("cuda_coconut", lora, config, adapter.base)
    try:
        import peft  # takes seconds: it opens transformers
    except ImportError:
        raise UserError("lora", "the torch twin needs peft for it: pip install peft") from None
    model.requires_grad_(False)
    # Nothing here depends on torch's own random state: every first value comes from the host.
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.scale * lora.rank,
                target_modules=list(layers),
                use_dora=lora.type == "dora",
            ),
            model,
        )
    draw = Draw()
    if lora.dropout and hasattr(model, "draw"):
        model.draw = draw  # a borrowed model's blocks are not given the key
    elif lora.dropout:
        for block in model.layers:
            block.register_forward_pre_hook(lambda _, args: setattr(draw, "key", args[4]))
    for number, path in enumerate(layers):
        layer = model.get_submodule(path)
        if lora.dropout:
            number = number % len(files.linear_layers(config)) + 1
            layer.lora_dropout["default"] = InputDropout(lora.dropout, number, draw)
    for path in files.vocabulary(config) if adapter.rows else ():
        base = model.get_submodule(path)
        rows = base.weight.detach()[list(adapter.rows)].clone()
        model.set_submodule(path, RowsEmbedding(base, adapter.rows, rows))
    shapes = files.trained_shapes(config, lora, len(adapter.rows))
    fresh = {n: s for n, s in shapes.items() if n.endswith((".lora_a", ".lora_b"))}
    drawn = {n: files.initial_factor(n, s, adapter.seed) for n, s in fresh.items()}
    _set(model, from_numpy(drawn))


@contextmanager
def disabled(model) -> Iterator[None]:
    """The frozen base alone: adapters and trained rows stand aside."""
    adapted = [m for m in model.modules() if hasattr(m, "lora_A")]
    rows = [m for m in model.modules() if isinstance(m, RowsEmbedding)]
    # twin: MLX takes the adapters out of the model; peft has a switch.
    _switch(adapted, rows, off=True)
    try:
        yield
    finally:
        _switch(adapted, rows, off=False)


def fused(model) -> dict[str, torch.Tensor]:
    """Float weights of a plain model that computes what this one does, under its own names."""
    weights = {}
    for name, w in model.named_parameters():
        parts = name.split(".")
        is_own = not {"lora_A", "lora_B", "lora_magnitude_vector", "rows"} & set(parts)
        if is_own and not name.startswith(RULE_PREFIX):
            plain = ".".join(part for part in parts if part not in ("base_layer", "base"))
            weights[plain] = w.detach()
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weights[f"{path}.weight"] = _whole_weight(module)
        elif isinstance(module, RowsEmbedding):
            weights[f"{path}.weight"] = module.weight.detach()
    return weights


def save(model, config: Mapping[str, Any], adapter: Adapter, directory: Path) -> None:
    """Write the adapter's files; see coconut/checkpoints/adapters.py."""
    own = to_hf({name: w.detach() for name, w in trained_weights(model).items()})
    trained = to_numpy({n: w for n, w in own.items() if not n.startswith(RULE_PREFIX)})
    paths = files.vocabulary(config) if adapter.rows else ()
    base = to_numpy({path: model.get_submodule(path).base.weight.detach() for path in paths})
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
    _set(model, arrays)


def to_hf(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and layout of trained arrays here -> those of the files."""
    return _renamed(weights, LEAVES)


def sanitize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and layout of trained arrays in the files -> those here."""
    return _renamed(weights, {ours: theirs for theirs, ours in LEAVES.items()})


def _renamed(weights: dict[str, torch.Tensor], leaves: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for name, w in weights.items():
        for old, new in leaves.items():
            if name.endswith(f".{old}"):
                name = name.removesuffix(old) + new
                w = w.T if w.ndim == 2 else w
        out[name] = w
    return out


def n_numbers(model) -> int:
    """Numbers in a plain model's weights."""
    return sum(w.numel() for w in model.parameters())


def _whole_weight(layer) -> torch.Tensor:
    """Weight of a linear layer with its adapter merged in, unless that stands aside."""
    if layer.disable_adapters:
        return layer.base_layer.weight.detach()
    w = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    if "default" not in layer.lora_magnitude_vector:
        return w
    lengths = layer.lora_magnitude_vector["default"].weight.detach()
    return w * (lengths / w.norm(dim=1))[:, None]


def _switch(adapted: list, rows: list[RowsEmbedding], off: bool) -> None:
    for layer in adapted:
        layer.enable_adapters(not off)
    for module in rows:
        module.is_disabled = off


@torch.no_grad()
def _set(model, arrays: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, w in sanitize(arrays).items():
        parameters[name].copy_(w)
