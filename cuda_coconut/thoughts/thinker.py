"""Who makes the thoughts of a forward pass: the published way, a given array, or a rule."""

import torch

from coconut.blocks import NEVER
from coconut.feedback.catalogue import Part
from coconut.feedback.thinking import Published, RuleThinker
from cuda_coconut.models.base import to_device
from cuda_coconut.thoughts.numbers import at_least_float32, entropy_of, rho


class Given(Published):
    """Thoughts (R, B, D) from elsewhere, in place of the model's own."""

    def __init__(self, thoughts: torch.Tensor):
        self.thoughts = thoughts

    def think(self, last: torch.Tensor, latent: int) -> torch.Tensor:
        """Row `latent` of what is given."""
        return self.thoughts[latent].to(last.dtype)


class Thinker(RuleThinker):
    """What the model's feedback rule reads at the column before a latent."""

    def column(self, h: torch.Tensor) -> torch.Tensor:
        """The last column (B, D) of states (B, T, D)."""
        return h[:, -1].clone()  # a view would keep all of h

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
