"""The verdict on a model: every field of its config.json and every tensor of its files is used,
known to be without effect, or a refusal that names it. docs/what_is_read.md shows these tables.

    judged             config.json -> its fields in our spelling: known, of a right type, in limits
    check_tensors      names, shapes and types of the tensors, from the headers alone
    without_constants  the numbers of what is dropped: causal masks, rotary frequencies
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

import numpy as np

from coconut.checkpoints.architectures import (
    COCONUT_PREFIX,
    HAND_WRITTEN,
    TRIED,
    Architecture,
    architecture,
    check_architecture,
    is_borrowed,
    resolved,
    strip_wrappers,
)
from coconut.checkpoints.model_args import (
    BORROWED,
    BORROWED_OF_TYPE,
    HEAD,
    KNOWN,
    OF_TYPE,
    SIZES,
    WITHOUT_EFFECT,
    Limit,
)
from coconut.checkpoints.safetensors import TensorEntry
from coconut.errors import UserError, shown, some

NOT_FINITE = "not finite: it holds NaN or infinity"
MOST_NUMBERS = 10**12
WEIGHT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types a weight may have, by safetensors name; float64 is read as float32."""
Array = Any
"""Of the twin that reads, or of numpy."""
EXPLAINER = "expainable_llm."
"""SIM-CoT's second model, which puts thoughts into words in training; the answer never needs it."""
WRAPPED = (COCONUT_PREFIX, EXPLAINER)
_HARMLESS = {name for names in WITHOUT_EFFECT.values() for name in names.split()}


def judged(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json in the spelling that is read here (see `resolved`), after every field was judged.

    Nothing is built. Raises UserError listing every field that is missing, of a wrong type, beyond
    a limit, computed otherwise than it says, or unknown. Of a borrowed model that no test holds,
    the twin that builds it judges unknown fields: see `check_borrowed`.
    """
    check_architecture(config, where)
    try:
        config = resolved(config)
    except ValueError as error:
        raise UserError(where, f"{error}: not supported") from None
    model_type = config["model_type"]
    hints: dict[str, Any] = BORROWED | dict.fromkeys(BORROWED_OF_TYPE.get(model_type, "").split())
    needed: Iterable[str] = SIZES
    if not is_borrowed(config):
        made = HAND_WRITTEN[model_type]
        hints = get_type_hints(made, include_extras=True) | OF_TYPE[model_type]
        needed = [f.name for f in fields(made) if f.default is MISSING]
    hints = KNOWN | hints
    problems = [f"{name}: missing" for name in needed if name not in config]
    for name, value in config.items():
        if limit := _broken(value, hints.get(name)):
            problems.append(f"{name}: expected {limit.words}, got {shown(repr(value))}")
    if not is_borrowed(config) or model_type in TRIED:
        problems += _unread(config, hints)
    if problems:
        raise UserError(where, *problems)
    if not is_borrowed(config):
        try:
            n = sum(map(math.prod, args_of(config).shapes().values()))
        except ValueError as error:
            raise UserError(where, str(error)) from None
        if n > MOST_NUMBERS:
            raise UserError(where, f"describes {n:.0e} numbers, more than any model has")
    return dict(config)


def _broken(value: Any, hint: Any) -> Limit | None:
    """The limit that a field's value breaks, of those in its annotation."""
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in parts:
        return None
    limits = [x for part in parts for x in (part, *getattr(part, "__metadata__", ()))]
    return next((x for x in limits if isinstance(x, Limit) and not x.allows(value)), None)


def check_borrowed(config: Mapping[str, Any], declared: Collection[str], where: str) -> None:
    """Raise UserError for fields of a borrowed model that its library, too, does not declare."""
    further = BORROWED_OF_TYPE.get(config["model_type"], "").split()
    if problems := _unread(config, BORROWED, KNOWN, further, declared):
        raise UserError(where, *problems)


def _unread(config: Mapping[str, Any], *known: Collection[str]) -> list[str]:
    """What to say of the fields that are neither known nor without effect in any model."""
    return [
        f"{shown(name)}: not known here, so it may change what the model computes; remove it if it"
        " does not"
        for name in config
        if name not in _HARMLESS and not any(name in names for names in known)
    ]


def args_of(config: Mapping[str, Any]) -> Any:
    """What the Model of a hand-written architecture is built from, of a config.json judged."""
    made = HAND_WRITTEN[config["model_type"]]
    names = {field.name for field in fields(made)}
    return made(**{name: value for name, value in config.items() if name in names})


def check_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], where: str
) -> None:
    """Raise UserError unless the tensors in a directory's headers are those of its config.json.

    Of a borrowed model only its library knows all names; the embedding and the layers are compared.
    """
    arch = architecture(config["model_type"])
    found = {arch.hub_name(name): entry for name, entry in tensors.items()}
    if foreign := [n for n in tensors if n.startswith(WRAPPED) or strip_wrappers(n) != n]:
        raise UserError(
            where,
            f"{shown(foreign[0])}: named by a wrapper that trained it; convert it first: python"
            f" convert/torch_to_mlx.py {where} DIRECTORY",
        )
    scaled = {name.removesuffix(".scales") for name in found if name.endswith(".scales")}
    if bool(config.get("quantization")) != bool(scaled):
        is_there = "has" if scaled else "has no"
        raise UserError(where, f"{is_there} quantised weights, unlike its config.json says")
    left_out = {n for n in found if arch.buffers.fullmatch(n) or n.rpartition(".")[0] in scaled}
    found = {name: entry for name, entry in found.items() if name not in left_out}
    if is_borrowed(config):
        expected = {arch.embedding: (config["vocab_size"], config["hidden_size"])}
        found = {name: entry for name, entry in found.items() if name in expected}
    else:
        expected = args_of(config).shapes()
        head, embedding = found.get(HEAD), found.get(arch.embedding)
        if head and embedding and HEAD not in expected and head.shape == embedding.shape:
            del found[HEAD]  # the tied one again
    expected = {n: s for n, s in expected.items() if n.rpartition(".")[0] not in scaled}
    check_weights(arch, found, expected, where)


def check_weights(
    arch: Architecture, found: Mapping[str, Any], expected: Mapping[str, Sequence[int]], where: str
) -> None:
    """Raise UserError unless tensors (by hub name; of a dtype and a shape) are those expected."""
    odd = [f"{n}: type {t.dtype}" for n, t in found.items() if t.dtype not in WEIGHT_TYPES]
    if odd:
        raise UserError(
            where, *some(f"{it}, expected one of {', '.join(WEIGHT_TYPES)}" for it in odd)
        )
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if is_turned(shapes, arch):
        shapes = {n: s[::-1] if n.endswith(arch.turned) else s for n, s in shapes.items()}
    check_fits(shapes, expected, where)


def is_turned(shapes: Mapping[str, tuple[int, ...]], arch: Architecture) -> bool:
    """Whether a file holds Linear weights where the hub's has Conv1D's, decided once from c_attn.

    The square attn.c_proj does not show its own orientation, so it follows.
    """
    shape = shapes.get("h.0.attn.c_attn.weight", ())
    return bool(arch.turned) and len(shape) == 2 and shape[0] > shape[1]


def check_fits(
    weights: Mapping[str, Sequence[int]], model: Mapping[str, Sequence[int]], where: str
) -> None:
    """Raise UserError unless weights have the names and shapes of a model's, listing what differs.

    Both: name -> shape.
    """
    problems = [f"{name}: missing" for name in model if name not in weights]
    problems += [
        f"{shown(name)}: not a tensor of this model" for name in weights if name not in model
    ]
    problems += [
        f"{name}: shape {tuple(shape)}, expected {tuple(model[name])}"
        for name, shape in weights.items()
        if name in model and tuple(shape) != tuple(model[name])
    ]
    if problems:
        raise UserError(where, *some(problems))


def without_constants(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    to_numpy: Callable[[dict[str, Array]], dict[str, np.ndarray]],
    where: str,
) -> dict[str, Array]:
    """A file's tensors without causal masks and rotary frequencies, which no model here reads.

    to_numpy: arrays to float32. Raises UserError for one that is not what its name says: the model
    it was trained in computed something else.
    """
    arch = architecture(config["model_type"])
    dropped = {n: w for n, w in weights.items() if arch.buffers.fullmatch(arch.hub_name(n))}
    problems = [
        f"{name}: not {what}, which this model computes with"
        for name, w in to_numpy(dropped).items()
        if (what := _unlike_constant(name, w, config))
    ]
    if problems:
        raise UserError(where, *some(problems))
    return {name: w for name, w in weights.items() if name not in dropped}


def _unlike_constant(name: str, w: np.ndarray, config: Mapping[str, Any]) -> str | None:
    """What a constant of this name should be, if it is not."""
    if name.endswith(".attn.bias"):
        n = w.shape[-1] if w.ndim else 0
        is_causal = w.size == n * n and np.array_equal(w.reshape(n, n) != 0, np.tri(n, dtype=bool))
        return None if is_causal else "a causal mask"
    if name.endswith(".attn.masked_bias"):
        return None if w.size == 1 and w.max() <= -1e4 else "a number like -10000"
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        return None  # scaled by the library
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = int(size * config.get("partial_rotary_factor", 1))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    expected = theta ** -(np.arange(0, size, 2) / size)
    # A file may hold them in bfloat16.
    is_like = w.shape == expected.shape and np.allclose(w, expected, rtol=1e-2, atol=0)
    return None if is_like else f"the rotary frequencies of rope_theta {theta:g}"
