"""Every source and transform that a rule may name, with options, limits and examples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from coconut.errors import nearest

WIDEST = 2**20
"""Most hidden units of a projection: more is a slip of the keyboard, and no machine's memory."""


class Span(NamedTuple):
    """Layers from start to stop, both included; None is the last one. See `layer_index`."""

    start: int | float
    stop: int | float | None

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"


class Threshold(NamedTuple):
    """rel: in units of a layer's rms; abs: as it is; topk: so many coordinates (or tokens)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


class Option(NamedTuple):
    """An argument of a source or transform. read: text -> value, or ValueError with the complaint.

    A default of ... must be given.
    """

    default: Any
    read: Callable[[str], Any]


def _whole(low: int | None = None, high: float = math.inf) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"expected a whole number, got {text!r}") from None
        if low is not None and value < low:
            raise ValueError(f"must be at least {low}, got {value}")
        if value > high:
            raise ValueError(f"must be at most {high}, got {value}")
        return value

    return read


def _number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"expected a number, got {text!r}") from None
        if not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {text!r}")
        if not low <= value <= high or (above and value == low):
            limits = f"{'above' if above else 'at least'} {low:g}"
            limits += f" and at most {high:g}" if math.isfinite(high) else ""
            raise ValueError(f"must be {limits}, got {text}")
        return value

    return read


def _choice(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(
                f"expected one of {', '.join(names)}, got {text!r}{nearest(text, names, ', ')}"
            )
        return text

    return read


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _layer(text: str) -> int | float:
    """A layer's number, negative from the top, or with a dot a share of the depth."""
    return _number(0, 1)(text) if "." in text else _whole()(text)


def _span(text: str) -> Span:
    start, colon, stop = text.partition(":")
    return Span(_layer(start or "0"), _layer(stop) if colon and stop else None)


def _threshold(text: str) -> Threshold:
    kind, colon, value = text.partition(":")
    if kind not in ("rel", "abs", "topk") or not colon:
        raise ValueError(f"expected rel:x, abs:x or topk:k, got {text!r}")
    return Threshold(kind, _whole(1)(value) if kind == "topk" else _number(0)(value))


def _or_epoch(text: str) -> int:
    return 0 if text == "epoch" else _whole(1)(text)


SOURCES: dict[str, dict[str, Option]] = {
    "last": {},
    "layer": {"n": Option(..., _whole())},
    "depth": {"f": Option(..., _number(0, 1))},
    "hf": {"n": Option(..., _layer)},
    "mean": {
        "layers": Option(Span(1, None), _span),
        "norm_each": Option(False, _flag),
        "learned": Option(False, _flag),
    },
    "prev_input": {},
    "suppressed": {
        "layers": Option(Span(0.5, None), _span),
        "space": Option("residual", _choice("residual", "vocab")),
        "sign": Option("magnitude", _choice("magnitude", "signed")),
        "value": Option("removed", _choice("removed", "before", "after")),
        "threshold": Option(Threshold("rel", 0.1), _threshold),
        "agg": Option("net", _choice("net", "sum", "mean")),
        "base": Option("last", _choice("last", "prev_input", "none")),
        "tokens": Option(0, _whole(0)),
        "subset": Option(0, _whole(0)),
        "lam": Option(1e-6, _number(0, above=True)),
        "refresh": Option(0, _or_epoch),
    },
    "suppressed_fork": {"from": Option(..., _layer), "threshold": Option(0.1, _number(0))},
    "soft": {
        "tau": Option(1.0, _number(0, above=True)),
        "topk": Option(0, _whole(0)),
        "topp": Option(1.0, _number(0, 1, above=True)),
        "renorm": Option(False, _flag),
        "straight_through": Option(False, _flag),
        "eos": Option(False, _flag),
        "stop": Option(0.0, _number(0)),
        "patience": Option(1, _whole(1)),
    },
    "token": {},
    "zero": {},
    "random": {"seed": Option(0, _whole(0))},
    "shuffle": {"seed": Option(0, _whole(0))},
}
"""Name -> its options; the first may be given without its name, a flag without a value."""

TRANSFORMS: dict[str, dict[str, Option]] = {
    "rms": {"scale": Option("rho", _choice("rho", "learned"))},
    "ln": {"kind": Option("model", _choice("model", "layer", "rms"))},
    "final_norm": {},
    "linear": {
        "init": Option("identity", _choice("identity", "orthogonal", "ridge")),
        "lam": Option(1.0, _number(0)),
    },
    "mlp": {
        "hidden": Option(0, _whole(1, WIDEST)),
        "phi": Option("gelu", _choice("gelu", "silu")),
        "norm_out": Option(False, _flag),
    },
    "mlp_plain": {
        "hidden": Option(2048, _whole(1, WIDEST)),
        "phi": Option("gelu", _choice("gelu", "silu")),
        "dropout": Option(0.0, _number(0, 0.999)),
    },
    "gate": {"c": Option(-4.0, _number(-math.inf)), "vector": Option(False, _flag)},
    "detach": {},
    "noise": {
        "sigma": Option(..., _number(0)),
        "when": Option("train", _choice("train", "always")),
        "schedule": Option("constant", _choice("constant", "linear")),
    },
}
"""As SOURCES."""

GAINS = ("rms.scale", "mlp.norm_in", "mlp.norm_out", "mlp_plain.norm")
"""Trained weights without weight decay."""
FLAGS = {
    name
    for options in (*SOURCES.values(), *TRANSFORMS.values())
    for name, option in options.items()
    if option.read is _flag
}


@dataclass(frozen=True)
class Part:
    """One source or transform with all of its options."""

    name: str
    options: Mapping[str, Any]

    def __getitem__(self, option: str) -> Any:
        return self.options[option]

    @property
    def is_trained(self) -> bool:
        """Whether it has weights."""
        options = self.options
        if self.name in ("mean", "rms"):
            return options.get("learned") is True or options.get("scale") == "learned"
        return self.name in ("linear", "mlp", "mlp_plain", "gate")

    def __str__(self) -> str:
        known = (SOURCES | TRANSFORMS)[self.name]
        said = []
        for i, (name, value) in enumerate(self.options.items()):
            if value == known[name].default:
                continue
            said.append(name if value is True else str(value) if i == 0 else f"{name}={value}")
        return self.name + (":" + ",".join(said) if said else "")


EXAMPLES = {"layer": "-1", "depth": "0.5", "hf": "-2", "suppressed_fork": "0.5", "noise": "0.1"}
