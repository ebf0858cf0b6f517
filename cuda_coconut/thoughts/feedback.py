"""Feedback rules: the states of one column -> the input of the latent behind it.

Names, options and where they are explained: coconut/feedback/rules.py, docs/feedback.md. The
formulas are in coconut/feedback/sources.py and transforms.py, for both twins.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from coconut.batches.batch import Batch
from coconut.feedback import attached
from coconut.feedback.weights import RidgeSums
from cuda_coconut.models import arrays
from cuda_coconut.models.shard import spread_like
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.latent import latent_forward


class Feedback(attached.Attached, nn.Module):
    """A rule on a model, with its trained weights."""

    xp = arrays

    def weights_of(self, part: str) -> dict[str, torch.Tensor]:
        """The trained weights of a part of the rule."""
        if part not in self._modules:
            self.add_module(part, nn.ParameterDict())
        return self.get_submodule(part)

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put weights by name into the rule."""
        for name, w in weights.items():
            part, _, weight = name.partition(".")
            own = self.weights_of(part)
            if weight in own:
                own[weight].data.copy_(spread_like(w, own[weight]))
            else:
                own[weight] = nn.Parameter(w)


attach = partial(attached.attach, Feedback)


@torch.no_grad()
def fitted(model, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """The rule's `linear` by least squares, from ĥ to the embedding of the next token, by name.

    batches: ordinary text, without latents.
    """
    part = model.feedback.rule.find("linear")
    sums = RidgeSums(model.feedback.width)
    for batch in batches:
        inputs = Inputs.of(batch, model.embedding.device)
        hidden = latent_forward(model, inputs, 0, 0).hidden
        sums.add(batch.mask, *map(arrays.to_host, (hidden, model.embed(inputs.ids))))
    return {name: torch.from_numpy(w) for name, w in sums.solve(part["lam"]).items()}
