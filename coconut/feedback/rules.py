"""Feedback rules by their strings: what a latent position receives. No arrays of a framework here.

    source[:arg][+source...][|transform[:arg]...]     last    depth:0.5|rms    last|mlp:2048

The sources are added, the transforms follow in order, noise comes last. Both twins' feedback.py
hold the formulas under the same names; docs/feedback.md is the catalogue.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from coconut.errors import UserError

if TYPE_CHECKING:
    from coconut.batches.batch import Batch

EPS = 1e-6
"""Smallest rms that a vector is divided by."""
LN_EPS = 1e-5
"""Added to the variance by the transform `ln`."""
WIDEST = 2**20
"""Most hidden units of a projection: more is a slip of the keyboard, and no machine's memory."""
FORK_ALIASES = {
    "-1": "last",
    "-2": "layer:-2",
    "0.5": "hf:0.5",
    "hs+supressed[0.5:]": "last+suppressed_fork:0.5",
    "supressed[0.5:]": "suppressed_fork:0.5",
    "ie+supressed[0.5:]": "prev_input+suppressed_fork:0.5",
    "ie+supressed[-1]": "prev_input+suppressed_fork:-1",
}
"""The fork's names (its spelling), for what they were evidently meant to be."""


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
                f"expected one of {', '.join(names)}, got {text!r}{_nearest(text, names)}"
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


@dataclass(frozen=True)
class Rule:
    """A parsed rule; two spellings of one rule are equal, and `str` is the one that is saved."""

    sources: tuple[Part, ...]
    transforms: tuple[Part, ...]
    noise: Part | None = None

    def __str__(self) -> str:
        parts = ["+".join(map(str, self.sources)), *map(str, self.transforms)]
        return "|".join([*parts, str(self.noise)] if self.noise else parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Sources and transforms."""
        return self.sources + self.transforms

    def find(self, name: str) -> Part | None:
        """The first part of this name."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def is_last(self) -> bool:
        """The published rule, which needs nothing but ĥ."""
        return str(self) == "last"

    @property
    def is_token(self) -> bool:
        """Every latent keeps its own embedding: one pass suffices."""
        return str(self) == "token"

    @property
    def is_fitted(self) -> bool:
        """Starts from a fit on ordinary text."""
        return any(part.name == "linear" and part["init"] == "ridge" for part in self.transforms)

    @property
    def refresh(self) -> int | None:
        """Updates that an inverse of WᵀW is kept in training, 0 for an epoch; None: not used."""
        for part in self.sources:
            if part.name == "suppressed" and part["space"] == "vocab" and not part["subset"]:
                return int(part["refresh"])
        return None

    @property
    def stop(self) -> Part | None:
        """The `soft` that ends the latents of a row that has become sure, when decoding."""
        part = self.find("soft")
        return part if part is not None and part["stop"] else None

    @property
    def without_noise(self) -> Rule:
        """The same with the same weights, undisturbed."""
        return replace(self, noise=None)

    @property
    def unscored(self) -> list[str]:
        """Parts by which a thought is not a function of its row and the weights alone.

        LaTRO, which scores a rationale again after it was drawn, has none of them.
        """
        parts = {
            "noise": self.noise,
            "shuffle": self.find("shuffle"),
            "soft:stop": self.stop,
            "suppressed:space=vocab without subset": self.refresh is not None,
        }
        return [name for name, is_there in parts.items() if is_there]

    def layers(self, n_layers: int) -> frozenset[int]:
        """Which of h^0..h^L the rule reads. Raises ValueError if the model lacks one."""
        return frozenset(i for part in self.sources for i in _layers_of(part, n_layers))


def parse(text: str) -> Rule:
    """The rule a string stands for. Raises ValueError: unknown names or arguments, with advice."""
    head, bar, tail = text.partition("|")
    head = FORK_ALIASES.get(head.strip(), head)
    if "[" in head:
        advice = _nearest(head.strip(), FORK_ALIASES)
        raise ValueError(f"unknown source {head.strip()!r}{advice}; docs/feedback.md has them all")
    text = head + bar + tail
    first, *others = (piece.strip() for piece in text.split("|"))
    sources = [_part(piece, SOURCES, "source") for piece in first.split("+")]
    transforms = [_part(piece, TRANSFORMS, "transform") for piece in others]
    noise = transforms.pop() if transforms and transforms[-1].name == "noise" else None
    if any(part.name == "noise" for part in transforms):
        raise ValueError("noise: comes last, and once")
    if noise and noise["sigma"] == 0:
        noise = None  # bit for bit
    sources = _with_base(sources, transforms)
    once = [part.name for part in (*sources, *transforms) if part.is_trained]
    once += [part.name for part in sources if part.name in ("suppressed", "soft", "shuffle")]
    for name in once:
        if once.count(name) > 1:
            raise ValueError(f"{name}: may occur once")
    return Rule(tuple(sources), tuple(transforms), noise)


def _part(text: str, known: Mapping[str, Mapping[str, Option]], kind: str) -> Part:
    name, _, arguments = text.strip().partition(":")
    if name not in known:
        other = "transform" if name in TRANSFORMS else "source" if name in SOURCES else ""
        advice = f"; it is a {other}" if other else _nearest(name, known)
        raise ValueError(f"unknown {kind} {name!r}{advice}; known: {', '.join(known)}")
    options = known[name]
    values: dict[str, Any] = {}
    for i, argument in enumerate(filter(None, arguments.split(","))):
        option, equals, value = (piece.strip() for piece in argument.partition("="))
        if not equals and option in FLAGS and option in options:
            value = "true"
        elif not equals and i == 0 and options:
            option, value = next(iter(options)), option
        if option not in options:
            takes = f"takes {', '.join(options)}" if options else "takes no argument"
            raise ValueError(
                f"{name}: unknown argument {option!r}{_nearest(option, options)}; {takes}"
            )
        if option in values:
            raise ValueError(f"{name}: {option} is given twice")
        try:
            values[option] = options[option].read(value)
        except ValueError as error:
            raise ValueError(f"{name}: {option}: {error}") from None
    missing = [n for n, option in options.items() if option.default is ... and n not in values]
    if missing:
        raise ValueError(f"{name}: needs {missing[0]}, as in {name}:{EXAMPLES[name]}")
    return Part(name, {n: values.get(n, option.default) for n, option in options.items()})


EXAMPLES = {"layer": "-1", "depth": "0.5", "hf": "-2", "suppressed_fork": "0.5", "noise": "0.1"}


def _with_base(sources: list[Part], transforms: list[Part]) -> list[Part]:
    """The base of `suppressed` as a source of its own: `suppressed` is `last+suppressed`."""
    number = next((i for i, part in enumerate(sources) if part.name == "suppressed"), None)
    if number is None:
        return sources
    part = sources[number]
    if part["space"] == "vocab":
        for option in ("sign", "value"):
            if part[option] != SOURCES["suppressed"][option].default:
                raise ValueError(f"suppressed: {option} is of the residual space only")
    else:
        for option in ("tokens", "subset", "lam", "refresh"):
            if part[option] != SOURCES["suppressed"][option].default:
                raise ValueError(f"suppressed: {option} needs space=vocab")
    base = part["base"]
    if len(sources) > 1:
        if base == "prev_input":
            raise ValueError("suppressed: base: the sources beside it are its base; remove base")
        bare = Part("suppressed", {**part.options, "base": "last"})
        return [*sources[:number], bare, *sources[number + 1 :]]
    if base == "none":
        scales = [t for t in transforms if t.name in ("rms", "ln", "mlp_plain")]
        if not scales and not any(t.name == "mlp" and t["norm_out"] for t in transforms):
            raise ValueError("suppressed: without a base it needs a scale: add |rms")
        return sources
    bare = Part("suppressed", {**part.options, "base": "last"})
    return [Part(base, {}), bare]


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else ""


# ---- layers by number


def layer_index(layer: int | float, n_layers: int) -> int:
    """Number 0..L of a layer: negative counts from L, a share of the depth is rounded down.

    Raises ValueError if there is no such layer.
    """
    if isinstance(layer, float):
        return math.floor(layer * n_layers)
    index = n_layers + 1 + layer if layer < 0 else layer
    if not 0 <= index <= n_layers:
        raise ValueError(
            f"layer {layer}: the model has the layers 0 to {n_layers} (or {-n_layers - 1} to -1)"
        )
    return index


def depth_index(share: float, n_layers: int) -> int:
    """Number of the layer nearest to a share of the depth; halves go up."""
    return math.floor(share * n_layers + 0.5)


def hf_index(n: int | float, n_layers: int) -> int:
    """Index 0..L into transformers' list (h^0, ..., h^{L-1}, ĥ): L means ĥ, h^L is not in it."""
    if isinstance(n, float):
        return min(math.floor(n * (n_layers + 1)), n_layers)
    return layer_index(n, n_layers)


def span_layers(span: Span, n_layers: int) -> tuple[int, int]:
    """(first, last) layer of a span. Raises ValueError if it is empty or leaves the model."""
    first = layer_index(span.start, n_layers)
    last = n_layers if span.stop is None else layer_index(span.stop, n_layers)
    if first > last:
        raise ValueError(f"layers {span}: from {first} to {last} there are none")
    return first, last


def transitions(part: Part, n_layers: int) -> list[tuple[int, int]]:
    """Pairs of layers that `suppressed` compares: neighbours, or for agg=net the two ends."""
    first, last = span_layers(part["layers"], n_layers)
    if first == last:
        raise ValueError(f"layers {part['layers']}: a transition needs two layers")
    if part["agg"] == "net":
        return [(first, last)]
    return [(i, i + 1) for i in range(first, last)]


def fork_indices(part: Part, n_layers: int) -> range:
    """l of the differences H[l+1] - H[l] that `suppressed_fork` adds up."""
    where = part["from"]
    if isinstance(where, float):
        return range(min(math.floor(where * (n_layers + 1)), n_layers - 1), n_layers)
    index = n_layers + where if where < 0 else where
    if not 0 <= index < n_layers:
        raise ValueError(f"difference {where}: the model has 0 to {n_layers - 1}")
    return range(index, index + 1)


def _layers_of(part: Part, n_layers: int) -> set[int]:
    try:
        if part.name == "layer":
            return {layer_index(part["n"], n_layers)}
        if part.name == "depth":
            return {depth_index(part["f"], n_layers)}
        if part.name == "hf":
            return {hf_index(part["n"], n_layers)} - {n_layers}
        if part.name == "mean":
            first, last = span_layers(part["layers"], n_layers)
            return set(range(first, last + 1))
        if part.name == "suppressed":
            return {i for pair in transitions(part, n_layers) for i in pair}
        if part.name == "suppressed_fork":
            found = fork_indices(part, n_layers)
            return {*found, found[-1] + 1} - {n_layers}
    except ValueError as error:
        raise ValueError(f"{part.name}: {error}") from None
    return set()


# ---- a rule in a run


@dataclass(frozen=True)
class Setup:
    """A rule and what it must know of the vocabulary.

    markers: ids of start, end and latent. n_tokens: ids below are tokens, rows beyond are spare.
    is_trained: its weights come with the checkpoint.
    """

    rule: Rule
    markers: tuple[int, int, int]
    eos_id: int
    n_tokens: int
    is_trained: bool = False

    def problems(self, n_layers: int, n_rows: int) -> list[str]:
        """What keeps the rule from running on a model of L layers with n_rows embeddings."""
        found = []
        try:
            self.rule.layers(n_layers)
        except ValueError as error:
            found.append(f"feedback {self.rule}: {error}")
        ids = [*self.markers, self.eos_id]
        if any(not 0 <= i < n_rows for i in ids):
            found.append(
                f"feedback {self.rule}: the markers and eos are tokens {ids}, but the embedding"
                f" has {n_rows} rows; give the tokenizer the model was trained with"
            )
        return found

    def excluded(self, with_eos: bool, n_rows: int) -> np.ndarray:
        """(V,) float32, 1 on rows that no thought is mixed from: markers, spare rows, eos."""
        out = np.zeros(n_rows, np.float32)
        out[self.n_tokens :] = 1
        out[list(self.markers)] = 1
        if not with_eos:
            out[self.eos_id] = 1
        return out


def shapes(rule: Rule, n_layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the rule's trained weights, without the prefix `feedback.`."""
    return {name: w.shape for name, w in initial_weights(rule, n_layers, width, 1.0, 0).items()}


def initial_weights(
    rule: Rule, n_layers: int, width: int, rho: float, seed: int
) -> dict[str, np.ndarray]:
    """float32 weights of a rule before training; rho: mean rms of an embedding row.

    Each has a stream of its own, made from its name and the seed. linear with init=ridge starts as
    the identity and is fitted before the first update.
    """
    out: dict[str, np.ndarray] = {}

    def normal(name: str, rows: int, columns: int) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(f"feedback.{name}".encode())])
        return rng.standard_normal((rows, columns))

    for part in rule.parts:
        if part.name == "mean" and part["learned"]:
            first, last = span_layers(part["layers"], n_layers)
            out["mean.alpha"] = np.zeros(last - first + 1)
        elif part.name == "rms" and part["scale"] == "learned":
            out["rms.scale"] = np.full(1, rho)
        elif part.name == "linear":
            out["linear.weight"] = np.eye(width)
            if part["init"] == "orthogonal":
                q, r = np.linalg.qr(normal("linear.weight", width, width))
                out["linear.weight"] = q * np.sign(np.diag(r))
            out["linear.bias"] = np.zeros(width)
        elif part.name == "mlp":
            hidden = part["hidden"] or 2 * width
            out["mlp.norm_in"] = np.ones(width)
            out["mlp.w1"] = normal("mlp.w1", hidden, width) / math.sqrt(width)
            out["mlp.b1"] = np.zeros(hidden)
            out["mlp.w2"] = np.zeros((width, hidden))
            out["mlp.b2"] = np.zeros(width)
            if part["norm_out"]:
                out["mlp.norm_out"] = np.full(width, rho)
        elif part.name == "mlp_plain":
            hidden = part["hidden"]
            out["mlp_plain.w1"] = normal("mlp_plain.w1", hidden, width) / math.sqrt(width)
            out["mlp_plain.w2"] = normal("mlp_plain.w2", width, hidden) / math.sqrt(hidden)
            out["mlp_plain.norm"] = np.full(width, rho)
        elif part.name == "gate":
            rows = width if part["vector"] else 1
            out["gate.weight"] = np.zeros((rows, width))
            out["gate.bias"] = np.full(rows, part["c"])
    return {name: w.astype(np.float32) for name, w in out.items()}


def random_row(part: Part, width: int) -> np.ndarray:
    """The fixed row (D,) of `random`, with rms 1."""
    row = np.random.default_rng([part["seed"], zlib.crc32(b"feedback.random")]).standard_normal(
        width
    )
    return (row / math.sqrt((row**2).mean())).astype(np.float32)


# ---- what the host makes for a batch

NOISE, DROPOUT, PARTNERS = 1, 2, 3
"""Kinds of draws, so that no two share a stream."""


def prepare(
    rule: Rule,
    batch: Batch,
    width: int,
    key: Sequence[int],
    training: bool,
    progress: float = 0.0,
) -> dict[str, np.ndarray]:
    """Arrays that a rule needs beside the states; empty for most rules.

    noise (R, B, D): sigma times standard normal, drawn from (key, row, latent), so that it depends
    neither on batch mates nor on the twin. kept (R, B, H): mlp_plain's dropout. partners (R, B):
    whose state `shuffle` gives. key: numbers that name the update. progress: share of the run that
    is done. Raises UserError if a row to be shuffled is alone.
    """
    R = batch.n_passes
    out: dict[str, np.ndarray] = {}

    def draws(kind: int, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        return np.array(
            [
                [draw(np.random.default_rng([*key, int(row), i, kind])) for row in batch.idx]
                for i in range(R)
            ]
        )

    if not R:
        return out
    noise, plain, shuffled = rule.noise, rule.find("mlp_plain"), rule.find("shuffle")
    if noise and (training or noise["when"] == "always"):
        sigma = noise["sigma"] * (1 - progress if noise["schedule"] == "linear" else 1)
        out["noise"] = draws(
            NOISE, lambda rng: np.float32(sigma) * rng.standard_normal(width, "f4")
        )
    if plain and plain["dropout"] and training:
        p = plain["dropout"]
        kept = draws(DROPOUT, lambda rng: rng.random(plain["hidden"], "f4") >= p)
        out["kept"] = (kept / (1 - p)).astype(np.float32)
    if shuffled:
        out["partners"] = np.array(
            [_partners(batch, i, shuffled["seed"]) for i in range(R)], np.int32
        )
    return out


def _partners(batch: Batch, i: int, seed: int) -> np.ndarray:
    """Another row for each; for rows that have the i-th latent another that has it, if any."""
    B = len(batch.idx)
    if B < 2:
        raise UserError(
            "feedback shuffle",
            "a batch of one row has no other row to take a state from; ask several questions at"
            " once, or change batch_size_training, eval_batch_size or the number of items",
        )
    rng = np.random.default_rng([seed, i, *map(int, batch.idx), PARTNERS])
    has = batch.is_latent[:, batch.first_latent + i]
    partners = (np.arange(B) + rng.integers(1, B)) % B
    rows = rng.permutation(np.flatnonzero(has))
    if len(rows) > 1:
        partners[rows] = np.roll(rows, 1)
    return partners


def inverse_gram(gram: np.ndarray, lam: float) -> np.ndarray:
    """(WᵀW + λI)⁻¹ in float64 from WᵀW (d, d), λ being lam times the mean of its diagonal."""
    gram = gram.astype(np.float64)
    return np.linalg.inv(gram + lam * np.trace(gram) / len(gram) * np.eye(len(gram)))


class RidgeSums:
    """Sums over tokens of ordinary text, from which `linear` is fitted in closed form."""

    def __init__(self, width: int):
        self.n = 0
        self.h, self.e = np.zeros(width), np.zeros(width)
        self.hh, self.eh = np.zeros((width, width)), np.zeros((width, width))

    def add(self, h: np.ndarray, e: np.ndarray) -> None:
        """h (N, D): ĥ of N tokens; e (N, D): embeddings of the tokens behind them."""
        h, e = h.astype(np.float64), e.astype(np.float64)
        self.n += len(h)
        self.h += h.sum(axis=0)
        self.e += e.sum(axis=0)
        self.hh += h.T @ h
        self.eh += e.T @ h

    def solve(self, lam: float) -> tuple[np.ndarray, np.ndarray]:
        """(P, b) that minimise the sum of ‖P h + b - e‖² plus lam ‖P‖²."""
        n = max(self.n, 1)
        hh = self.hh - np.outer(self.h, self.h) / n
        eh = self.eh - np.outer(self.e, self.h) / n
        P = np.linalg.solve(hh + lam * np.eye(len(hh)), eh.T).T
        b = (self.e - P @ self.h) / n
        return P.astype(np.float32), b.astype(np.float32)


# ---- what thoughts look like


class ThoughtStatistics:
    """Means over rows of what the twins measure of thoughts, one number a latent."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, measured: Mapping[str, np.ndarray], is_latent: np.ndarray) -> None:
        """measured: name -> (R, B); is_latent (B, R): which rows have the latent. NaN: no value."""
        for name, values in measured.items():
            counts = is_latent.T & np.isfinite(values)
            self._add(name, np.where(counts, values, 0).sum(axis=1), counts.sum(axis=1))

    def add_rank(self, thoughts: np.ndarray, is_latent: np.ndarray) -> None:
        """Effective rank of each latent's thoughts (R, B, D) over the rows that have it.

        exp of the entropy of the singular values of the centred thoughts (Roy and Vetterli 2007).
        """
        ranks, counts = np.zeros(len(thoughts)), np.zeros(len(thoughts))
        for i, (a, has) in enumerate(zip(thoughts, is_latent.T, strict=True)):
            if has.sum() > 1:
                s = np.linalg.svd(a[has] - a[has].mean(axis=0), compute_uv=False)
                p = s / s.sum() if s.sum() else np.ones(1)
                ranks[i] = math.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
                counts[i] = 1
        self._add("effective_rank", ranks, counts)

    def _add(self, name: str, sums: np.ndarray, counts: np.ndarray) -> None:
        for store, values in ((self._sums, sums), (self._counts, counts)):
            old = store.get(name, np.zeros(0))
            total = np.zeros(max(len(old), len(values)))
            total[: len(old)] += old
            total[: len(values)] += values
            store[name] = total

    def means(self) -> dict[str, list[float | None]]:
        """Name -> a mean for each latent, None where no row had a value."""
        return {
            name: [
                round(float(s / c), 6) if c else None
                for s, c in zip(sums, self._counts[name], strict=True)
            ]
            for name, sums in self._sums.items()
        }
