"""The verdict on a model: every field of its config.json and every tensor of its files is used,
known to be without effect, or a refusal that names it. docs/what_is_read.md shows these tables.

    judged             config.json -> its fields in our spelling: known, of a right type, in limits
    check_tensors      names, shapes and types of the tensors, from the headers alone
    without_constants  the numbers of what is dropped: causal masks, rotary frequencies
"""

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
    OF_TYPE,
    ONLY,
    SIZES,
    WITHOUT_EFFECT,
    Limit,
)
from coconut.checkpoints.safetensors import TensorEntry
from coconut.errors import UserError, shown, some

NOT_FINITE = "not finite: it holds NaN or infinity"
MOST_LAYERS, MOST_NUMBERS = 10_000, 10**12
"""Beyond these a config.json is a slip or an attack, and building it would never end."""
WEIGHT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
"""Types a weight may have, by safetensors name; float64 is read as float32."""
Array = Any
"""Of the twin that reads, or of numpy."""
EXPLAINER = "expainable_llm."
"""SIM-CoT's second model, which puts thoughts into words in training; the answer never needs it."""
WRAPPED = (COCONUT_PREFIX, EXPLAINER)
_HARMLESS = {name for names in WITHOUT_EFFECT.values() for name in names}


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
    limits, only = BORROWED, ONLY | dict.fromkeys(BORROWED_OF_TYPE.get(model_type, ()), ())
    needed: Iterable[str] = SIZES
    if not is_borrowed(config):
        made = HAND_WRITTEN[model_type]
        limits, only = get_type_hints(made, include_extras=True), ONLY | OF_TYPE[model_type]
        needed = [f.name for f in fields(made) if f.default is MISSING]
    problems = [f"{name}: missing" for name in needed if name not in config]
    for name, value in config.items():
        problems += _limited(name, value, limits[name]) if name in limits else ()
        if name in only and only[name] and value not in only[name]:
            problems.append(
                f"{name}: {shown(repr(value))} is not computed here, only {only[name][0]}"
            )
    if not is_borrowed(config):
        problems += _quantization(config)
    if not is_borrowed(config) or model_type in TRIED:
        problems += _unread(config, limits, only)
    if problems:
        raise UserError(where, *problems)
    _check_size(config, where)
    if not is_borrowed(config):
        try:
            args_of(config)
        except ValueError as error:
            raise UserError(where, str(error)) from None
    return dict(config)


def check_borrowed(config: Mapping[str, Any], declared: Collection[str], where: str) -> None:
    """Raise UserError for fields of a borrowed model that its library, too, does not declare."""
    further = BORROWED_OF_TYPE.get(config["model_type"], ())
    if problems := _unread(config, BORROWED, ONLY, further, declared):
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


def _limited(name: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a value of a field that is annotated like this."""
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if value is None and type(None) in parts:
        return []
    limits = [x for part in parts for x in getattr(part, "__metadata__", ())]
    broken = [x.words for x in limits if isinstance(x, Limit) and not x.allows(value)]
    return [f"{name}: expected {broken[0]}, got {shown(repr(value))}"] if broken else []


def _quantization(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with mlx_lm's settings of quantised weights, under both of their names."""
    ours = config.get("quantization")
    theirs = config.get("quantization_config")
    if theirs not in (None, {}) and theirs != ours:
        return ["quantization_config: only what mlx_lm quantised is read, not this; take the float"]
    if ours in (None, {}):
        return []
    if not isinstance(ours, dict):
        return [f"quantization: expected an object, got {shown(repr(ours))}"]
    allowed = {"bits": (2, 3, 4, 5, 6, 8), "group_size": (16, 32, 64, 128)}
    return [
        f"quantization: {n}: expected one of {str(values)[1:-1]}, got {shown(repr(ours.get(n)))}"
        for n, values in allowed.items()
        if type(ours.get(n)) is not int or ours[n] not in values
    ]


def _check_size(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a model that nobody could build."""
    is_gpt2 = config["model_type"] == "gpt2"
    layers, width = (
        config[a if is_gpt2 else b]
        for a, b in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"))
    )
    inner = config.get("n_inner") or 4 * width if is_gpt2 else config["intermediate_size"]
    rows = config["vocab_size"] + (config["n_positions"] if is_gpt2 else 0)
    n = width * (rows + layers * (width + inner))
    if layers > MOST_LAYERS or n > MOST_NUMBERS:
        raise UserError(
            where,
            f"{layers:,} layers of width {width:,}: more than the {MOST_LAYERS:,} layers or"
            f" {MOST_NUMBERS:.0e} numbers that are believed",
        )


def check_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], where: str
) -> None:
    """Raise UserError unless the tensors in a directory's headers are those of its config.json.

    Of a borrowed model only its library knows all names; the embedding and the layers are compared.
    """
    arch = architecture(config["model_type"])
    n_layers = config.get("n_layer", config.get("num_hidden_layers"))
    found = {arch.hub_name(name): entry for name, entry in tensors.items()}
    if n_layers > len(found):
        there = arch.n_layers(found)
        raise UserError(where, f"{n_layers} layers in {where}/config.json, {there} in the file")
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
    found = {
        name: entry
        for name, entry in found.items()
        if not arch.buffers.fullmatch(name) and name.rpartition(".")[0] not in scaled
    }
    problems = [
        f"{name}: type {entry.dtype}, expected one of {', '.join(WEIGHT_TYPES)}"
        for name, entry in found.items()
        if entry.dtype not in WEIGHT_TYPES
    ]
    if problems:
        raise UserError(where, *some(problems))
    shapes = {name: entry.shape for name, entry in found.items()}
    embedding = shapes.get(arch.embedding)
    if is_borrowed(config):
        expected = {arch.embedding: (config["vocab_size"], config["hidden_size"])}
        shapes = {} if embedding is None else {arch.embedding: embedding}
    else:
        expected = args_of(config).shapes()
        if HEAD not in expected and shapes.get(HEAD) == embedding:
            shapes.pop(HEAD, None)  # the tied one again
        if is_turned(shapes, arch):
            shapes = {n: s[::-1] if n.endswith(arch.turned) else s for n, s in shapes.items()}
    expected = {n: s for n, s in expected.items() if n.rpartition(".")[0] not in scaled}
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
