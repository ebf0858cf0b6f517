"""Reading a checkpoint of any known layout: recognised, renamed, every tensor accounted for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coconut.checkpoints.adapters import ADAPTER_CONFIG
from coconut.checkpoints.architectures import (
    ARCHITECTURES,
    COCONUT_PREFIX,
    GPT2,
    WRAPPER_COPY,
    Architecture,
    architecture,
    check_architecture,
    strip_wrappers,
)
from coconut.checkpoints.checkpoint import (
    CHECKSUMS,
    COCONUT,
    CONFIG,
    FEEDBACK,
    OPTIMIZER,
    WEIGHTS,
    WEIGHTS_INDEX,
    describe,
    index_files,
    verify,
    weight_files,
)
from coconut.checkpoints.model_args import FORK_IDS, HEAD
from coconut.checkpoints.safetensors import Tensor, read_safetensors, safetensors_header
from coconut.checkpoints.verdict import (
    EXPLAINER,
    NOT_FINITE,
    WEIGHT_TYPES,
    check_weights,
    is_turned,
    judged,
    without_constants,
)
from coconut.convert.keymap import gpt2_config, shapes_of
from coconut.convert.tensors import read_file
from coconut.errors import UserError, shown, some
from coconut.files import read_json

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TRAINER_STATE = "trainer_state.json"


@dataclass
class Checkpoint:
    """A checkpoint as it was found.

    kind: what it is, in words. tensors: by hub name, in the hub's layout, each weight once.
    foreign: the same tensors under their own names (wrappers stripped) in their own layout, which
    `verify` gives to a twin. has_latents: trained with latents. coconut: our coconut.json.
    directory: where its tokenizer may lie; None for a file. notes: what was inferred or dropped.
    """

    kind: str
    architecture: Architecture
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    foreign: dict[str, Tensor]
    has_latents: bool
    coconut: dict[str, Any] | None = None
    directory: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Rows of the embedding."""
        return self.tensors[self.architecture.embedding].shape[0]

    def summary(self) -> str:
        """One line: what it is, and of what size."""
        types = sorted({WEIGHT_TYPES[t.dtype] for t in self.tensors.values()})
        n = sum(t.data.size for t in self.tensors.values())
        return (
            f"{self.kind}: {self.architecture.model_type}, {n / 1e6:.1f}M weights,"
            f" {self.n_rows:,} rows, {' and '.join(types)}"
        )


def read(source: Path, config_path: Path | None = None) -> Checkpoint:
    """Recognise and read a checkpoint file or directory; nothing is written.

    config_path: config.json of a bare state dict, or a directory that holds it; otherwise inferred.
    Raises UserError: no known layout, damaged, tensors missing, left over or of a wrong shape.
    """
    if source.is_dir():
        if config_path is not None:
            raise UserError(str(source), f"has its own {CONFIG}; remove --config")
        return _read_directory(source)
    if not source.exists():
        raise UserError(str(source), "no such file or directory")
    if config_path is None and (source.parent / CONFIG).exists():
        raise UserError(
            str(source), f"part of the directory {source.parent}, which has a {CONFIG}: give that"
        )
    return _read_bare(source, config_path)


def _read_bare(source: Path, config_path: Path | None) -> Checkpoint:
    raw, is_torch, notes = read_file(source)
    where = str(source)  # of the config, where there is one
    config: dict[str, Any] | None = None
    if config_path is not None:
        path = config_path / CONFIG if config_path.is_dir() else config_path
        where, config = str(path), read_json(path)
    foreign, found, has_latents = _named(raw, str(source), config, where, notes)
    if config is not None:
        shape = next(t.shape for n, t in foreign.items() if found.hub_name(n) == found.embedding)
        rows = shape[0] if shape else 0
        if config.get("vocab_size") != rows:
            notes.append(f"vocab_size {rows} from the weights, not {config.get('vocab_size')}")
            config["vocab_size"] = rows
    elif found is GPT2:
        shapes = {GPT2.hub_name(name): tensor.shape for name, tensor in foreign.items()}
        config, inferred = gpt2_config(shapes, where)
        notes.append(f"inferred from shapes: {', '.join(inferred)}; --config FILE says otherwise")
    else:
        raise UserError(
            where, f"a {found.model_type} state dict does not say its heads: give --config FILE"
        )
    tensors, config = _fit(foreign, found, config, str(source), where, notes)
    what = "Coconut" if has_latents else "CoT"
    official = {COCONUT_PREFIX * has_latents + found.body + found.hub_name(found.embedding)}
    if official <= foreign.keys():
        kind = f"official {what} state dict" + ("" if is_torch else " as safetensors")
    else:
        kind = f"flat {'torch file' if is_torch else 'safetensors'} of the MLX port's kind ({what})"
    return Checkpoint(kind, found, config, tensors, foreign, has_latents, notes=notes)


def _read_directory(source: Path) -> Checkpoint:
    if (source / CHECKSUMS).exists():
        verify(source)
    if not (source / CONFIG).exists():
        raise UserError(
            str(source), f"no {CONFIG}; for a bare state dict give the file itself, not its folder"
        )
    config = read_json(source / CONFIG)
    where, notes = str(source / CONFIG), list[str]()
    raw, how = _directory_weights(source, notes)
    foreign, found, has_latents = _named(raw, str(source), config, where, notes)
    tensors, config = _fit(foreign, found, config, str(source), where, notes)
    coconut = None
    if (source / COCONUT).exists():
        coconut = describe(source)["coconut"]
        has_latents = coconut.get("latent_ids") is not None
        kind = "our checkpoint directory"
        if (source / OPTIMIZER).exists() or (source / TRAINER_STATE).exists():
            _check_trainer(source, tensors)
            kind += " with optimizer and trainer state"
    elif all(name in config for name in FORK_IDS):
        kind, has_latents = "the fork's folder", True
    else:
        kind = "Hugging Face directory"
    if has_latents and coconut is None and not all(name in config for name in FORK_IDS):
        kind += " of a Coconut wrapper"
    return Checkpoint(
        kind + how, found, config, tensors, foreign, has_latents, coconut, source, notes
    )


def _directory_weights(source: Path, notes: list[str]) -> tuple[dict[str, Tensor], str]:
    """(tensors, how they are stored if not in one safetensors file)."""
    is_safe = (source / WEIGHTS).exists() or (source / WEIGHTS_INDEX).exists()
    if is_safe:
        files = [source / name for name in weight_files(source)]
    elif (source / PICKLED_INDEX).exists() and (source / PICKLED).exists():
        raise UserError(
            str(source),
            f"two sets of weights: {PICKLED} and the files of {PICKLED_INDEX}; remove one",
        )
    elif (source / PICKLED_INDEX).exists():
        files = [source / name for name in index_files(source / PICKLED_INDEX)]
    elif (source / PICKLED).exists():
        files = [source / PICKLED]
    elif (source / ADAPTER_CONFIG).exists():
        raise UserError(
            str(source),
            "holds an adapter, not a whole model; make one of it first: mlx-coconut fuse",
        )
    else:
        raise UserError(
            str(source), f"no weights: expected {WEIGHTS}, {PICKLED}, or an index of shards"
        )
    raw: dict[str, Tensor] = {}
    for path in files:
        part, _, said = (read_safetensors(path), False, []) if is_safe else read_file(path)
        notes += said
        twice = [
            f"{shown(name)}: in {path.name} and in a shard before it" for name in part.keys() & raw
        ]
        if twice:
            raise UserError(str(source), *some(twice))
        raw.update(part)
    how = [f"{len(files)} shards"] * (len(files) > 1) + ["pickled"] * (not is_safe)
    return raw, f" ({', '.join(how)})" if how else ""


def _named(
    raw: Mapping[str, Tensor],
    where: str,
    config: Mapping[str, Any] | None,
    config_where: str,
    notes: list[str],
) -> tuple[dict[str, Tensor], Architecture, bool]:
    """(tensors with wrappers stripped from their names, architecture, whether latents are used).

    SIM-CoT's second model is left out, and noted.
    Raises UserError if the architecture is not the config's, where there is one.
    """
    if config is not None:
        check_architecture(config, config_where)
    foreign: dict[str, Tensor] = {}
    n_left = 0
    for name, tensor in raw.items():
        stripped = strip_wrappers(name)
        if stripped.startswith(EXPLAINER):
            n_left += 1
            continue
        if stripped in foreign:
            raise UserError(where, f"{shown(stripped)}: there twice, under different prefixes")
        foreign[stripped] = tensor
    if n_left:
        notes.append(f"{n_left} tensors of {EXPLAINER}* left out: they only explained thoughts")
    for found in ARCHITECTURES.values():
        if any(found.hub_name(name) == found.embedding for name in foreign):
            # The wrapper's own copy names the kind as well as its prefix does.
            has_latents = any(n.startswith(COCONUT_PREFIX) or n == WRAPPER_COPY for n in foreign)
            wanted = found if config is None else architecture(config["model_type"])
            if wanted.embedding != found.embedding or (
                wanted.model_type in ARCHITECTURES and wanted is not found
            ):
                raise UserError(
                    config_where,
                    f"model_type {wanted.model_type}, but the weights are {found.model_type}'s",
                )
            return foreign, wanted, has_latents
    names = ", ".join(shown(name) for name in list(foreign)[:3]) or "none at all"
    raise UserError(
        where, f"not the tensors of {' or '.join(ARCHITECTURES)}; the first are: {names}"
    )


def _fit(
    foreign: Mapping[str, Tensor],
    found: Architecture,
    config: Mapping[str, Any],
    where: str,
    config_where: str,
    notes: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by hub name in the hub's layout, config.json as it was judged).

    notes: gets what was joined, cast or dropped.
    Every tensor is used once: a weight, a copy of the embedding with the same bits, or a constant.
    """
    hub = [found.hub_name(name) for name in foreign]
    n_layers = config.get("n_layer", config.get("num_hidden_layers"))
    # Before the table is made: a silly number would make a table of any length.
    if type(n_layers) is int and n_layers > len(foreign):
        raise UserError(
            where, f"{n_layers} layers in the config, {found.n_layers(hub)} in the file"
        )
    config = judged(config, config_where)
    if config.get("quantization"):
        raise UserError(
            config_where, "quantised weights are not converted; mlx-coconut fuse makes them float"
        )
    expected = shapes_of(config, config_where)
    tensors: dict[str, Tensor] = {}
    copies: list[tuple[str, Tensor]] = []
    weights = without_constants(config, foreign, _numbers, where)
    for name, tensor in weights.items():
        hub_name = found.hub_name(name)
        if name == WRAPPER_COPY or (hub_name == HEAD and HEAD not in expected):
            copies.append((name, tensor))
        elif hub_name in tensors:
            raise UserError(where, f"{shown(name)}: a second {hub_name}")
        else:
            tensors[hub_name] = tensor
    check_weights(found, tensors, expected, where)
    if is_turned({n: t.shape for n, t in tensors.items()}, found):
        notes.append("Linear layout (out, in): the four matrices of each layer are turned")
        tensors = {n: t.turned() if n.endswith(found.turned) else t for n, t in tensors.items()}
    problems = [
        f"{name}: {NOT_FINITE}"
        for name, tensor in tensors.items()
        if not np.isfinite(tensor.float32()).all()
    ]
    problems += [
        f"{name}: not the same numbers as {found.embedding}, which it is tied to"
        for name, tensor in copies
        if not tensor.is_same(tensors[found.embedding])
    ]
    if problems:
        raise UserError(where, *some(problems))
    if copies:
        notes.append(f"{' and '.join(name for name, _ in copies)}: the tied embedding again")
    if n_buffers := len(foreign) - len(weights):
        notes.append(f"{n_buffers} constants dropped (masks, rotary frequencies)")
    if any(t.dtype == "F64" for t in tensors.values()):
        notes.append("float64 read as float32, as both twins compute")
        config |= {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
        tensors |= {n: Tensor("F32", t.float32()) for n, t in tensors.items() if t.dtype == "F64"}
    return {name: tensors[name] for name in expected}, config


def _numbers(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.float32().reshape(tensor.shape) for name, tensor in tensors.items()}


def _check_trainer(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """What a resumed run reads: both moments of every weight, and how far the run got."""
    state = read_json(source / TRAINER_STATE)
    lacking = [n for n in ("epoch", "update_in_epoch", "n_updates", "seed") if n not in state]
    if lacking:
        raise UserError(str(source / TRAINER_STATE), f"lacks {', '.join(lacking)}")
    trained = {n: t.shape for n, t in tensors.items()}
    if (source / FEEDBACK).exists():
        rule = safetensors_header(source / FEEDBACK)
        trained |= {name: entry.shape for name, entry in rule.items()}
    expected = {f"{kind}.{n}": shape for kind in ("m", "v") for n, shape in trained.items()}
    entries = safetensors_header(source / OPTIMIZER)
    shapes = {name: entry.shape for name, entry in entries.items() if name != "step"}
    wrong = [n for n in expected if expected[n] != shapes.get(n)]
    wrong += [n for n in shapes if n not in expected]
    if wrong or "step" not in entries:
        raise UserError(
            str(source / OPTIMIZER),
            *some(
                f"{shown(name)}: {shapes.get(name, 'missing')}, expected"
                f" {expected.get(name, 'no such moment')}"
                for name in (wrong or ["step"])
            ),
        )
