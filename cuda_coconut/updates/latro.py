"""LaTRO's steps: sample rationales, score them, one policy-gradient update.

No dropout anywhere, so that what is scored is what was drawn and what is updated.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding
from coconut.batches.results import PolicyStats, Sampled, Scores
from coconut.batches.rollouts import RolloutBatch
from cuda_coconut.models.arrays import to_device
from cuda_coconut.thoughts.generate import sample
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.latent import latent_forward
from cuda_coconut.updates.train import Trainer

CHUNK = 512
"""Scored positions whose logits exist at one time: 50,257 of them in float32 take 0.2 MB each."""


class Policy:
    """The model as LaTRO's policy, and the frozen weights it is held against."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.reference = None

    def keep_reference(self) -> None:
        """Freeze the weights of now as the reference."""
        self.reference = None  # first: there is not always room for an old one and a new one
        # Frozen weights beside an adapter are shared, not copied.
        shared = {id(p): p for p in self.trainer.model.parameters() if not p.requires_grad}
        self.reference = copy.deepcopy(self.trainer.model, shared).requires_grad_(False)

    def sample(
        self,
        prompts: Batch,
        decoding: Decoding,
        source: np.ndarray,
        streams: Sequence[tuple[int, ...]],
    ) -> list[Sampled]:
        """New tokens of the rows of `source`; see `generate.sample`."""
        n_passes = prompts.n_passes * self.trainer.feeds_back
        with self.trainer.compute_weights():
            return sample(self.trainer.model, prompts, n_passes, decoding, source, streams)

    def score(self, batch: RolloutBatch, of_reference: bool = False) -> Scores:
        """Log-probability and entropy of every target, in the targets' order."""
        model = self.reference if of_reference else self.trainer.model
        with torch.no_grad():
            parts = self._scored(model, batch, with_entropy=True)
        logprobs, entropies = (part.cpu().numpy()[: batch.n_real] for part in parts)
        return Scores(logprobs, entropies)

    def step(self, micro_batches: Sequence[RolloutBatch], lr: float) -> PolicyStats:
        """One update on minus the summed log-probabilities times their weights, and the surrogate
        of batches that have one."""
        scored = []
        self.trainer.join_gradients()
        for batch in micro_batches:
            s = batch.surrogate
            with_entropy = s is not None and s.has_entropy
            parts, entropies = self._scored(self.trainer.model, batch, with_entropy, recompute=True)
            coefficients = to_device(batch.target_weight, parts.device)
            loss = -(parts * coefficients).sum()
            if s is not None:
                arrays = [to_device(a, parts.device) for a in s.arrays]
                loss = loss + surrogate_loss(parts, entropies, arrays, s.low, s.high)
            loss.backward()
            scored.append(parts.detach())
        norm = self.trainer.update(lr)
        # The one point where the host waits for the device.
        pairs = zip(scored, micro_batches, strict=True)
        return PolicyStats(norm.item(), [p.cpu().numpy()[: batch.n_real] for p, batch in pairs])

    def _scored(
        self, model, batch: RolloutBatch, with_entropy: bool = False, recompute: bool = False
    ):
        trainer = self.trainer
        n_passes = batch.n_passes if trainer.feeds_back else 0
        index, targets = (
            to_device(a, trainer.device) for a in (batch.target_index, batch.target_ids)
        )
        temperature = batch.temperature
        if temperature is not None:
            temperature = to_device(temperature, trainer.device)
        checkpointing = trainer.checkpointing and recompute
        with trainer.compute_weights():
            inputs = Inputs.of(batch, trainer.device)
            hidden = latent_forward(
                model, inputs, batch.first_latent, n_passes, None, checkpointing
            ).hidden
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
            args = (model, hidden, targets, temperature, with_entropy)
            return span_logprobs(*args, recompute)


def span_logprobs(
    model, hidden, targets, temperature, with_entropy: bool = False, recompute: bool = False
):
    """(log-probabilities, entropies or None) of targets (N,) at hidden (N, D), in chunks.

    temperature: (N,) that the logits are divided by, or None. In float32 whatever the model's type.
    recompute: the backward pass computes the logits of a chunk anew instead of keeping them.
    """

    def scored(hidden, targets, temperature):
        logits = model.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature is not None:
            logits = logits / temperature[:, None]
        logprobs = logits.log_softmax(dim=-1)
        picked = logprobs.gather(1, targets.long()[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1) if with_entropy else picked
        return picked, entropy

    parts = []
    for start in range(0, len(targets), CHUNK):
        chunk = slice(start, start + CHUNK)
        divided = None if temperature is None else temperature[chunk]
        args = (hidden[chunk], targets[chunk], divided)
        if recompute and len(targets) > CHUNK:
            parts.append(checkpoint(scored, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(scored(*args))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def surrogate_loss(logprobs, entropies, arrays, low: float, high: float):
    """Minus the clipped objective, k3 and minus the entropy bonus: see `batches/surrogate.py`.

    logprobs, entropies (or None): (N,) of the targets. arrays: those of a `Surrogate`.
    """
    old, ref, share, group, gain, kl_weight, entropy_weight = arrays
    moved = logprobs.new_zeros(len(gain)).index_add(0, group, share * (logprobs - old))
    ratio = moved.exp()
    loss = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain).sum()
    # Elsewhere ref says nothing: its exp may overflow, and 0 times that is no number.
    gap = torch.where(kl_weight > 0, ref - logprobs, 0)
    loss = loss + (kl_weight * (gap.exp() - gap - 1)).sum()
    return loss if entropies is None else loss - (entropy_weight * entropies).sum()
