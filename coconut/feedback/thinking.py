"""Who makes the thoughts of a forward pass: the published way, a given array, or a rule."""

from collections.abc import Callable
from typing import Any

from coconut.blocks import Array, Tap
from coconut.feedback.catalogue import Part
from coconut.feedback.sizes import entropy_of, rho


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


class Given(Published):
    """Thoughts (R, B, D) from elsewhere, in place of the model's own. xp: see sizes.py."""

    def __init__(self, xp: Any, thoughts: Array):
        self.xp, self.thoughts = xp, thoughts

    def think(self, last: Array, latent: int) -> Array:
        """Row `latent` of what is given."""
        return self.xp.cast(self.thoughts[latent], last)


class Thinker(Published):
    """What a model's feedback rule reads at the column before a latent.

    prepared: what `prepare` made of the batch.
    """

    def __init__(self, model: Any, prepared: dict[str, Array] | None = None):
        self.model, self.prepared = model, prepared or {}
        self.feedback, self.xp = model.feedback, model.feedback.xp
        self.layers: dict[int, Array] = {}
        """Raw h^l (B, D) of the layers that the rule wants."""
        self.latent = 0
        self.may_stop = "may_stop" in self.prepared
        self.has_stopped: Array | None = None
        self._had_stopped: Array | None = None
        self._n_sure: Array = 0
        self._once = {name: a for name, a in self.prepared.items() if name == "inverse"}

    def watch(self, x: Array, positions: Array) -> Tap:
        """Begin a pass over inputs x (B, T, D); the tap keeps what the rule wants."""
        self.input, self._position = x[:, -1], positions[:, -1]
        self.layers = {}

        def tap(layer: int, h: Array) -> None:
            if layer in self.feedback.wanted:
                self.layers[layer] = self.xp.last_column(h)

        return tap

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

    @property
    def rho(self) -> Array:
        """Mean rms of an embedding row, without gradient."""
        return self.once("rho", lambda: rho(self.xp, self.model))

    def logits(self, with_eos: bool = False) -> Array:
        """float32 logits (B, V) of ĥ; markers, spare rows and eos are out of reach."""
        if self._logits is None:
            self._logits = self.xp.at_least_float32(self.model.head(self.last))
        logits = self._logits

        def excluded() -> Array:
            rows = self.feedback.setup.excluded(with_eos, logits.shape[-1])
            return self.xp.from_host(rows, logits)

        return self.xp.never_where(self.once(f"excluded {with_eos}", excluded), logits)

    def note_entropy(self, logits: Array, part: Part) -> None:
        """Count for how many latents a row has been sure; from `patience` on its latents end."""
        is_sure = entropy_of(self.xp, logits) < part["stop"]
        self._n_sure = (self._n_sure + 1) * is_sure
        stops = self._n_sure >= part["patience"]
        self.has_stopped = stops if self.has_stopped is None else self.has_stopped | stops


def thinker_for(
    xp: Any, model: Any, replaced: Array | None = None, prepared: dict[str, Array] | None = None
) -> Published:
    """Who makes the thoughts of a forward pass; arguments as for `latent_forward`."""
    if replaced is not None:
        return Given(xp, replaced)
    return Published() if model.feedback is None else Thinker(model, prepared)
