"""Who makes the thoughts of a forward pass: the published way, a given array, or a rule."""

import mlx.core as mx

from coconut.blocks import NEVER
from coconut.feedback.catalogue import Part
from coconut.feedback.thinking import Published, RuleThinker
from mlx_coconut.thoughts.numbers import entropy_of, rho


class Given(Published):
    """Thoughts (R, B, D) from elsewhere, in place of the model's own."""

    def __init__(self, thoughts: mx.array):
        self.thoughts = thoughts

    def think(self, last: mx.array, latent: int) -> mx.array:
        """Row `latent` of what is given."""
        return self.thoughts[latent].astype(last.dtype)


class Thinker(RuleThinker):
    """What the model's feedback rule reads at the column before a latent."""

    @property
    def rho(self) -> mx.array:
        """Mean rms of an embedding row, without gradient."""
        return self.once("rho", lambda: rho(self.model))

    def logits(self, with_eos: bool = False) -> mx.array:
        """float32 logits (B, V) of ĥ; markers, spare rows and eos are out of reach."""
        if self._logits is None:
            self._logits = self.model.head(self.last).astype(mx.float32)
        n_rows = self._logits.shape[-1]
        out = mx.array(self.feedback.setup.excluded(with_eos, n_rows))
        return self._logits * (1 - out) + out * NEVER

    def note_entropy(self, logits: mx.array, part: Part) -> None:
        """Count for how many latents a row has been sure; from `patience` on its latents end."""
        entropy = entropy_of(logits)
        if self._n_sure is None or self.has_stopped is None:
            self._n_sure = mx.zeros(entropy.shape)
            self.has_stopped = mx.zeros(entropy.shape, mx.bool_)
        self._n_sure = (self._n_sure + 1) * (entropy < part["stop"])
        self.has_stopped = self.has_stopped | (self._n_sure >= part["patience"])


def thinker_for(
    model, replaced: mx.array | None = None, prepared: dict[str, mx.array] | None = None
) -> Published:
    """Who makes the thoughts of a forward pass; arguments as for `latent_forward`."""
    if replaced is not None:
        return Given(replaced)
    return Published() if model.feedback is None else Thinker(model, prepared)
