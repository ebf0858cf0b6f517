"""Feedback rules: the states of one column -> the input of the latent behind it.

Names, options and where they are explained: coconut/feedback/rules.py, docs/feedback.md. The
formulas are in coconut/feedback/sources.py and transforms.py, for both twins.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from coconut.batches.batch import Batch
from coconut.feedback import attached
from coconut.feedback.weights import RidgeSums
from mlx_coconut.models import arrays
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import latent_forward


class Feedback(attached.Attached, nn.Module):
    """A rule on a model, with its trained weights."""

    xp = arrays

    def weights_of(self, part: str) -> dict[str, mx.array]:
        """The trained weights of a part of the rule."""
        return self.setdefault(part, {})

    def set_weights(self, weights: Mapping[str, mx.array]) -> None:
        """Put weights by name into the rule."""
        for name, w in weights.items():
            part, _, weight = name.partition(".")
            self.weights_of(part)[weight] = w.astype(mx.float32)


attach = partial(attached.attach, Feedback)


def fitted(model, batches: Iterable[Batch]) -> dict[str, mx.array]:
    """The rule's `linear` by least squares, from ĥ to the embedding of the next token, by name.

    batches: ordinary text, without latents.
    """
    part = model.feedback.rule.find("linear")
    sums = RidgeSums(model.feedback.width)
    for batch in batches:
        inputs = Inputs.of(batch)
        hidden = latent_forward(model, inputs, 0, 0).hidden
        sums.add(batch.mask, *map(arrays.to_host, (hidden, model.embed(inputs.ids))))
    return {name: mx.array(w) for name, w in sums.solve(part["lam"]).items()}
