"""A rule on a model: its trained weights, the thoughts it makes, what it needs of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coconut.batches.batch import Batch
from coconut.blocks import Array
from coconut.errors import UserError
from coconut.feedback import draws
from coconut.feedback.sizes import rho, rms
from coconut.feedback.sources import SOURCES, inverse_of_head
from coconut.feedback.thinking import Thinker
from coconut.feedback.transforms import TRANSFORMS
from coconut.feedback.weights import Inverses, Setup, initial_weights, shapes


class Attached:
    """A rule on a model, mixed into a module class of the twin's that holds its trained weights.

    It lies in the model as `model.feedback`, so that its weights are parameters like any other.
    """

    xp: Any
    """The twin's array functions, see sizes.py."""

    def __init__(self, model: Any, setup: Setup):
        super().__init__()
        self.setup, self.rule = setup, setup.rule
        self.n_layers, self.width = len(model.layers), model.embedding.shape[1]
        self.wanted = setup.rule.layers(self.n_layers)
        self.version = 0
        """Counts changes of the model's parameters; whoever changes them adds 1."""
        self.inverses = Inverses(setup.rule, inverse_of_head)
        for name, shape in shapes(self.rule, self.n_layers, self.width).items():
            zeros = self.xp.from_host(np.zeros(shape, np.float32), model.embedding)
            self.set_weights({name: self.xp.cast(zeros, model.embedding)})

    def weights_of(self, part: str) -> Mapping[str, Array]:
        """The trained weights of a part of the rule."""
        raise NotImplementedError

    def set_weights(self, weights: Mapping[str, Array]) -> None:
        """Put weights by name into the rule."""
        raise NotImplementedError

    def set_trained(self, weights: Mapping[str, Array]) -> None:
        """Put all of a checkpoint's weights into the rule.

        Raises UserError if they are not those that it needs.
        """
        expected = shapes(self.rule, self.n_layers, self.width)
        found = {name: tuple(w.shape) for name, w in weights.items()}
        if found != expected:
            raise UserError(
                f"feedback {self.rule}",
                f"needs the weights {describe_shapes(expected)}, the checkpoint has"
                f" {describe_shapes(found)}",
            )
        self.set_weights(weights)

    def think(self, thinker: Thinker) -> Array:
        """The thought (B, D) that the rule makes of what the thinker has read."""
        first, *others = (SOURCES[part.name](thinker, part) for part in self.rule.sources)
        a = sum(others, first)
        for part in self.rule.transforms:
            a = TRANSFORMS[part.name](thinker, part, a)
        if "noise" in thinker.prepared:
            a = a + self.xp.detach(rms(self.xp, a)) * thinker.prepared["noise"][thinker.latent]
        return self.xp.cast(a, thinker.last)


def describe_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names and shapes as a message shows them."""
    return ", ".join(f"{n} {s}" for n, s in sorted(shapes.items())) or "none"


def attach(
    make: Callable[[Any, Setup], Any],
    model: Any,
    setup: Setup | None,
    seed: int = 0,
    trained: Mapping[str, Array] | None = None,
) -> None:
    """Let a model think by a rule; the published rule and none leave it as it is.

    make: the twin's class of rules. trained: the rule's weights without prefix, if a checkpoint has
    them; otherwise they start from the seed. Raises UserError if the model lacks a layer or a
    marker, or weights do not fit.
    """
    model.feedback = None
    if setup is None or setup.rule.is_last or setup.rule.is_token:
        return
    n_layers, (n_rows, width) = len(model.layers), model.embedding.shape
    if problems := setup.problems(n_layers, n_rows):
        raise UserError("model", *problems)
    feedback = make(model, setup)
    if trained is None:
        xp, E = feedback.xp, model.embedding
        drawn = initial_weights(setup.rule, n_layers, width, rho(xp, model).item(), seed)
        trained = {name: xp.from_host(w, E) for name, w in drawn.items()}
    feedback.set_trained(trained)
    model.feedback = feedback


def prepare(
    model: Any,
    batch: Batch,
    key: Sequence[int],
    training: bool = False,
    progress: float = 0.0,
    decoding: bool = False,
) -> dict[str, Array]:
    """What the model's rule needs for a batch beside its states; empty for most rules.

    key: numbers that name the update; progress: share of the run that is done. decoding: rows that
    are sure may end their latents. See `draws.prepare`.
    """
    feedback = model.feedback
    if feedback is None:
        return {}
    made = draws.prepare(feedback.rule, batch, feedback.width, key, training, progress, decoding)
    arrays = {name: feedback.xp.from_host(a, model.embedding) for name, a in made.items()}
    if feedback.rule.refresh is not None and batch.n_passes:
        arrays["inverse"] = feedback.inverses.of(model, training)
    return arrays
