"""Feedback rules: the states of one column -> the input of the latent behind it.

Names, options and where they are explained: coconut/feedback/rules.py, docs/feedback.md.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from coconut.batches.batch import Batch
from coconut.errors import UserError
from coconut.feedback import draws
from coconut.feedback import rules as rules
from coconut.feedback.weights import Inverses, RidgeSums, Setup, initial_weights, shapes
from cuda_coconut.models.base import additive_mask, to_device
from cuda_coconut.models.shard import spread_like
from cuda_coconut.thoughts.numbers import rho, rms
from cuda_coconut.thoughts.sources import SOURCES, inverse_of_head
from cuda_coconut.thoughts.thinker import Thinker
from cuda_coconut.thoughts.transforms import TRANSFORMS


class Feedback(nn.Module):
    """A rule on a model, with its trained weights.

    It lies in the model as `model.feedback`, so that its weights are parameters like any other.
    """

    def __init__(self, setup: Setup, n_layers: int, width: int):
        super().__init__()
        self.setup, self.rule = setup, setup.rule
        self.n_layers, self.width = n_layers, width
        self.wanted = setup.rule.layers(n_layers)
        self.version = 0
        """Counts changes of the model's parameters; whoever changes them adds 1."""
        self.inverses = Inverses(setup.rule, inverse_of_head)
        for name, shape in shapes(self.rule, n_layers, width).items():
            part, _, weight = name.partition(".")
            if part not in self._modules:
                self.add_module(part, nn.ParameterDict())
            self.get_submodule(part)[weight] = nn.Parameter(torch.zeros(shape))

    def weights_of(self, part: str) -> dict[str, torch.Tensor]:
        """The trained weights of a part of the rule."""
        return self.get_submodule(part)

    def think(self, thinker: Thinker) -> torch.Tensor:
        """The thought (B, D) that the rule makes of what the thinker has read."""
        first, *others = (SOURCES[part.name](thinker, part) for part in self.rule.sources)
        a = sum(others, first)
        for part in self.rule.transforms:
            a = TRANSFORMS[part.name](thinker, part, a)
        if "noise" in thinker.prepared:
            a = a + rms(a).detach() * thinker.prepared["noise"][thinker.latent]
        return a.to(thinker.last.dtype)


def attach(
    model, setup: Setup | None, seed: int = 0, trained: dict[str, torch.Tensor] | None = None
) -> None:
    """Let a model think by a rule; the published rule and none leave it as it is.

    trained: the rule's weights without prefix, if a checkpoint has them; otherwise they start from
    the seed. Raises UserError if the model lacks a layer or a marker, or weights do not fit.
    """
    model.feedback = None
    if setup is None or setup.rule.is_last or setup.rule.is_token:
        return
    n_layers, (n_rows, width) = len(model.layers), model.embedding.shape
    if problems := setup.problems(n_layers, n_rows):
        raise UserError("model", *problems)
    feedback = Feedback(setup, n_layers, width)
    if trained is None:
        drawn = initial_weights(setup.rule, n_layers, width, rho(model).item(), seed)
        trained = {name: torch.from_numpy(w) for name, w in drawn.items()}
    set_trained(feedback, trained)
    model.feedback = feedback.to(model.embedding.device, model.embedding.dtype)


def set_trained(feedback: Feedback, weights: dict[str, torch.Tensor]) -> None:
    """Put all of a checkpoint's weights into a rule.

    Raises UserError if they are not those that it needs.
    """
    expected = shapes(feedback.rule, feedback.n_layers, feedback.width)
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if found != expected:
        raise UserError(
            f"feedback {feedback.rule}",
            f"needs the weights {describe_shapes(expected)}, the checkpoint has"
            f" {describe_shapes(found)}",
        )
    set_weights(feedback, weights)


def describe_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Names and shapes as a message shows them."""
    return ", ".join(f"{n} {tuple(s)}" for n, s in sorted(shapes.items())) or "none"


def set_weights(feedback: Feedback, weights: dict[str, torch.Tensor]) -> None:
    """Put weights by name into a rule."""
    for name, w in weights.items():
        part, _, weight = name.partition(".")
        own = feedback.weights_of(part)[weight]
        own.data.copy_(spread_like(w, own))


@torch.no_grad()
def fitted(model, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """The rule's `linear` by least squares, from ĥ to the embedding of the next token, by name.

    batches: ordinary text, without latents.
    """
    feedback = model.feedback
    part = feedback.rule.find("linear")
    sums = RidgeSums(feedback.width)
    device = model.embedding.device
    for batch in batches:
        arrays = (batch.ids, batch.mask, batch.positions)
        ids, mask, positions = (torch.from_numpy(a).to(device) for a in arrays)
        x = model.embed(ids)
        hidden = model.trunk(x, positions, additive_mask(mask, 0, ids.shape[1], x.dtype))
        has_next = batch.mask[:, :-1] & batch.mask[:, 1:]
        h, e = (a.cpu().numpy() for a in (hidden, x))
        sums.add(h[:, :-1][has_next], e[:, 1:][has_next])
    P, b = (torch.from_numpy(w) for w in sums.solve(part["lam"]))
    return {"linear.weight": P, "linear.bias": b}


def prepare(
    model,
    batch: Batch,
    key: Sequence[int],
    training: bool = False,
    progress: float = 0.0,
    decoding: bool = False,
) -> dict[str, torch.Tensor]:
    """What the model's rule needs for a batch beside its states; empty for most rules.

    key: numbers that name the update; progress: share of the run that is done. decoding: rows that
    are sure may end their latents. See `coconut.feedback.prepare`.
    """
    feedback = model.feedback
    if feedback is None:
        return {}
    made = draws.prepare(feedback.rule, batch, feedback.width, key, training, progress)
    device = model.embedding.device
    arrays = {name: to_device(a, device) for name, a in made.items()}
    if feedback.rule.refresh is not None and batch.n_passes:
        arrays["inverse"] = feedback.inverses.of(model, training)
    if decoding and feedback.rule.stop:
        arrays["may_stop"] = torch.tensor(True)
    return arrays
