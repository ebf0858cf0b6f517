"""Feedback rules by their strings: what a latent position receives. No arrays of a framework here.

    source[:arg][+source...][|transform[:arg]...]     last    depth:0.5|rms    last|mlp:2048

The sources are added, the transforms follow in order, noise comes last. sources.py and
transforms.py hold the formulas under the same names; docs/feedback.md is the catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from coconut.errors import nearest
from coconut.feedback.catalogue import EXAMPLES, FLAGS, SOURCES, TRANSFORMS, Option, Part
from coconut.feedback.layers import _layers_of

EPS = 1e-6
"""Smallest rms that a vector is divided by."""
LN_EPS = 1e-5
"""Added to the variance by the transform `ln`."""
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
    def without_noise(self) -> Self:
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
        advice = nearest(head.strip(), FORK_ALIASES, ", ")
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
        advice = f"; it is a {other}" if other else nearest(name, known, ", ")
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
                f"{name}: unknown argument {option!r}{nearest(option, options, ', ')}; {takes}"
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
