"""Who makes the thoughts of a forward pass: the published way, a given array, or a rule."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coconut.feedback import rules as rules
from coconut.feedback.catalogue import Part
from cuda_coconut.models.base import NEVER, Tap, to_device
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.numbers import at_least_float32, entropy_of, rho


class Published:
    """The published thought: the last state as it is. One thinker serves one forward pass."""

    def watch(self, x: torch.Tensor, positions: torch.Tensor) -> Tap | None:
        """Begin a pass over inputs x (B, T, D); the tap is shown the states between its blocks."""
        return None

    def think(self, last: torch.Tensor, latent: int) -> torch.Tensor:
        """The thought (B, D) behind a column whose state after the final norm is `last` (B, D)."""
        return last

    def spare(self, inputs: Inputs, column: int) -> Inputs:
        """The inputs without this column's latent in rows that had enough of them before it."""
        return inputs


class Given(Published):
    """Thoughts (R, B, D) from elsewhere, in place of the model's own."""

    def __init__(self, thoughts: torch.Tensor):
        self.thoughts = thoughts

    def think(self, last: torch.Tensor, latent: int) -> torch.Tensor:
        """Row `latent` of what is given."""
        return self.thoughts[latent].to(last.dtype)


class Thinker(Published):
    """What the model's feedback rule reads at the column before a latent."""

    def __init__(self, model, prepared: dict[str, torch.Tensor] | None = None):
        self.model, self.prepared = model, prepared or {}
        self.feedback = model.feedback
        self.layers: dict[int, torch.Tensor] = {}
        """Raw h^l (B, D) of the layers that the rule wants."""
        self.latent = 0
        self.may_stop = "may_stop" in self.prepared
        self.has_stopped: torch.Tensor | None = None
        self._had_stopped: torch.Tensor | None = None
        self._n_sure: torch.Tensor | None = None
        self._once = {name: a for name, a in self.prepared.items() if name == "inverse"}

    def watch(self, x: torch.Tensor, positions: torch.Tensor) -> Tap:
        """Begin a pass over inputs x (B, T, D); the tap keeps what the rule wants."""
        self.input, self._position = x[:, -1], positions[:, -1]
        self.layers = {}

        def tap(layer: int, h: torch.Tensor) -> None:
            if layer in self.feedback.wanted:
                self.layers[layer] = h[:, -1].clone()  # a view would keep all of h

        return tap

    def think(self, last: torch.Tensor, latent: int) -> torch.Tensor:
        """What the rule makes of the column: (B, D), of `last`'s type."""
        self.last, self.latent = last, latent
        self._logits: torch.Tensor | None = None
        self._had_stopped = self.has_stopped
        return self.feedback.think(self).to(last.dtype)

    def spare(self, inputs: Inputs, column: int) -> Inputs:
        """Inputs without the latents of rows that have been sure for long enough."""
        had_stopped = self._had_stopped
        return inputs if had_stopped is None else inputs.without_latent(column, had_stopped)

    def state(self, layer: int) -> torch.Tensor:
        """h^layer (B, D); h^0 without the position embedding, which the next input gets anew."""
        h = self.layers[layer]
        offset = self.model.position_embedding(self._position) if layer == 0 else None
        return h if offset is None else h - offset

    def weight(self, name: str) -> torch.Tensor:
        """A trained weight of the rule, by part.weight."""
        part, _, weight = name.partition(".")
        return self.feedback.get_submodule(part)[weight]

    def once(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value that all passes share."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    @property
    def rho(self) -> torch.Tensor:
        """Mean rms of an embedding row, without gradient."""
        return self.once("rho", lambda: rho(self.model))

    def logits(self, with_eos: bool = False) -> torch.Tensor:
        """float32 logits (B, V) of ĥ; markers, spare rows and eos are out of reach."""
        if self._logits is None:
            self._logits = at_least_float32(self.model.head(self.last))
        logits = self._logits

        def excluded() -> torch.Tensor:
            rows = self.feedback.setup.excluded(with_eos, logits.shape[-1])
            return to_device(rows.astype(bool), logits.device)

        return logits.masked_fill(self.once(f"excluded {with_eos}", excluded), NEVER)

    def note_entropy(self, logits: torch.Tensor, part: Part) -> None:
        """Count for how many latents a row has been sure; from `patience` on its latents end."""
        entropy = entropy_of(logits)
        if self._n_sure is None or self.has_stopped is None:
            self._n_sure = torch.zeros_like(entropy)
            self.has_stopped = torch.zeros_like(entropy, dtype=torch.bool)
        self._n_sure = (self._n_sure + 1) * (entropy < part["stop"])
        self.has_stopped = self.has_stopped | (self._n_sure >= part["patience"])


def thinker_for(
    model, replaced: torch.Tensor | None = None, prepared: dict[str, torch.Tensor] | None = None
) -> Published:
    """Who makes the thoughts of a forward pass; arguments as for `latent_forward`."""
    if replaced is not None:
        return Given(replaced)
    return Published() if model.feedback is None else Thinker(model, prepared)
