"""Thinking with a feedback rule, as far as it needs none of a twin's array functions."""

from collections.abc import Callable
from typing import Any

from coconut.blocks import Array, Tap
from coconut.feedback.catalogue import Part
from coconut.feedback.layers import depth_index, hf_index, layer_index


class Published:
    """The published thought: the last state as it is. One thinker serves one forward pass."""

    def watch(self, x: Array, positions: Array) -> Tap | None:
        """Begin a pass over inputs x (B, T, D); the tap is shown the states between its blocks."""
        return None

    def think(self, last: Array, latent: int) -> Array:
        """The thought (B, D) behind a column whose state after the final norm is `last` (B, D)."""
        return last

    def spare(self, inputs: Any, column: int) -> Any:
        """The inputs without this column's latent in rows that had enough of them before it."""
        return inputs


class RuleThinker(Published):
    """What a model's feedback rule reads at the column before a latent.

    prepared: what `feedback.prepare` of the twin made of the batch.
    """

    def __init__(self, model: Any, prepared: dict[str, Array] | None = None):
        self.model, self.prepared = model, prepared or {}
        self.feedback = model.feedback
        self.layers: dict[int, Array] = {}
        """Raw h^l (B, D) of the layers that the rule wants."""
        self.latent = 0
        self.may_stop = "may_stop" in self.prepared
        self.has_stopped: Array | None = None
        self._had_stopped: Array | None = None
        self._n_sure: Array | None = None
        self._once = {name: a for name, a in self.prepared.items() if name == "inverse"}

    def watch(self, x: Array, positions: Array) -> Tap:
        """Begin a pass over inputs x (B, T, D); the tap keeps what the rule wants."""
        self.input, self._position = x[:, -1], positions[:, -1]
        self.layers = {}

        def tap(layer: int, h: Array) -> None:
            if layer in self.feedback.wanted:
                self.layers[layer] = self.column(h)

        return tap

    def column(self, h: Array) -> Array:
        """The last column (B, D) of states (B, T, D)."""
        return h[:, -1]

    def think(self, last: Array, latent: int) -> Array:
        """What the rule makes of the column: (B, D), of `last`'s type."""
        self.last, self.latent = last, latent
        self._logits: Array | None = None
        self._had_stopped = self.has_stopped
        return self.feedback.think(self)

    def spare(self, inputs: Any, column: int) -> Any:
        """The inputs without the latents of rows that have been sure for long enough."""
        had_stopped = self._had_stopped
        return inputs if had_stopped is None else inputs.without_latent(column, had_stopped)

    def state(self, layer: int) -> Array:
        """h^layer (B, D); h^0 without the position embedding, which the next input gets anew."""
        h = self.layers[layer]
        offset = self.model.position_embedding(self._position) if layer == 0 else None
        return h if offset is None else h - offset

    def weight(self, name: str) -> Array:
        """A trained weight of the rule, by part.weight."""
        part, _, weight = name.partition(".")
        return self.feedback.weights_of(part)[weight]

    def once(self, name: str, make: Callable[[], Array]) -> Array:
        """A value that all passes share."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]


# ---- sources: (thinker, part) -> (B, D)


def last(t: RuleThinker, part: Part) -> Array:
    """ĥ, the state after the final norm: what the published checkpoints were trained on."""
    return t.last


def layer(t: RuleThinker, part: Part) -> Array:
    """h^n, negative counts from the top."""
    return t.state(layer_index(part["n"], t.feedback.n_layers))


def depth(t: RuleThinker, part: Part) -> Array:
    """h^l at a share of the depth."""
    return t.state(depth_index(part["f"], t.feedback.n_layers))


def hf(t: RuleThinker, part: Part) -> Array:
    """Entry n of transformers' hidden_states, whose last is ĥ."""
    n = hf_index(part["n"], t.feedback.n_layers)
    return t.last if n == t.feedback.n_layers else t.state(n)


def prev_input(t: RuleThinker, part: Part) -> Array:
    """u_s: the input of the column itself, before any position embedding."""
    return t.input


SOURCES: dict[str, Callable[[Any, Part], Array]] = {
    "last": last,
    "layer": layer,
    "depth": depth,
    "hf": hf,
    "prev_input": prev_input,
}
"""Those that only choose among states; the others are in each twin's thoughts/sources.py."""
