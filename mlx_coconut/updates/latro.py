"""LaTRO's steps: sample rationales, score them, one policy-gradient update.

No dropout anywhere, so that what is scored is what was drawn and what is updated.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from coconut.batches.batch import Batch
from coconut.batches.decoding import Decoding
from coconut.batches.results import PolicyStats, Sampled, Scores
from coconut.batches.rollouts import RolloutBatch
from mlx_coconut.models.cpu import logsumexp, softmax
from mlx_coconut.thoughts.generate import sample
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import latent_forward
from mlx_coconut.updates.train import Trainer

CHUNK = 512
"""Scored positions whose logits exist at one time: 50,257 of them in float32 take 0.2 MB each."""
HEADS = ("lm_head", "embed_tokens", "wte")
"""The module whose weights `head` multiplies with, by its name in any of the architectures."""


class Policy:
    """The model as LaTRO's policy, and the frozen weights it is held against."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.reference = None
        self._compiled: dict = {}

    def keep_reference(self) -> None:
        """Freeze the weights of now as the reference."""
        # twin: MLX's arrays never change, so keeping the references to them is the copy.
        self.reference = self.trainer.model.parameters()

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
        weights = self.reference if of_reference else self.trainer.model.parameters()
        logprobs, entropies = self._call("score", _scores, weights, batch)
        return Scores(np.array(logprobs)[: batch.n_real], np.array(entropies)[: batch.n_real])

    def step(self, micro_batches: Sequence[RolloutBatch], lr: float) -> PolicyStats:
        """One update on minus the summed log-probabilities times their weights, and the surrogate
        of batches that have one."""
        total, logprobs = None, []
        for batch in micro_batches:
            weights = self.trainer.model.trainable_parameters()
            (_, parts), grads = self._call("loss", _weighted, weights, batch)
            total = grads if total is None else tree_map(mx.add, total, grads)
            # Once a micro-batch, or the activations of all of them would be alive at the update.
            mx.eval(parts, total)
            logprobs.append(np.array(parts)[: batch.n_real])
        if self.trainer.world.size > 1:
            total = self.trainer.world.sum(total)
            mx.eval(total)
        norm = self.trainer.update(total, 1.0, lr)
        return PolicyStats(norm, logprobs)

    def _call(self, kind: str, function, weights, batch: RolloutBatch):
        """Call a function of (model, batch's arrays), compiled once a pass plan and kind."""
        trainer, model = self.trainer, self.trainer.model
        n_passes = batch.n_passes if trainer.feeds_back else 0
        tempered, branches = batch.temperature is not None, batch.segments is not None
        s = batch.surrogate
        clip = None if s is None else (s.low, s.high, s.has_entropy)
        plan = (kind, batch.first_latent, n_passes, tempered, branches, clip)
        if plan not in self._compiled:

            def forward(weights, arrays):
                trainer.n_traces += 1  # runs only while tracing
                inputs, index, targets, coefficients, temperature, surrogate = arrays
                model.update(weights)
                with trainer.compute_weights():
                    checkpointing = trainer.checkpointing and kind == "loss"
                    hidden = latent_forward(
                        model, Inputs(*inputs), batch.first_latent, n_passes, None, checkpointing
                    ).hidden
                    hidden = hidden.reshape(-1, hidden.shape[-1])[index]
                    args = (targets, temperature, coefficients, surrogate, clip)
                    return function(model, hidden, *args)

            run = mx.value_and_grad(forward) if kind == "loss" else forward
            self._compiled[plan] = mx.compile(run)
        kept = model.parameters()
        try:
            return self._compiled[plan](weights, _arrays(batch))
        finally:
            model.update(kept)  # tracing leaves placeholders in the model


def span_logprobs(
    model, hidden, targets, temperature, with_entropy: bool = False, recompute: bool = False
):
    """(log-probabilities, entropies or None) of targets (N,) at hidden (N, D), in chunks.

    temperature: (N,) that the logits are divided by, or None. In float32 whatever the model's type.
    recompute: the backward pass computes the logits of a chunk anew instead of keeping them.
    """
    head = next(getattr(model, name) for name in HEADS if hasattr(model, name))
    parts = []
    for start in range(0, len(targets), CHUNK):
        chunk = slice(start, start + CHUNK)

        def scored(parameters, hidden, targets, temperature):
            head.update(parameters)
            # Recomputing asks for every input's gradient; an index has none.
            targets = mx.stop_gradient(targets)
            logits = model.head(hidden)
            if logits.dtype != mx.float64:
                logits = logits.astype(mx.float32)
            if temperature is not None:
                logits = logits / temperature[:, None]
            total = logsumexp(logits)
            picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            entropy = total - (softmax(logits) * logits).sum(axis=-1) if with_entropy else total
            return picked - total, entropy

        run = mx.checkpoint(scored) if recompute and len(targets) > CHUNK else scored
        parameters = head.trainable_parameters()
        divided = None if temperature is None else temperature[chunk]
        parts.append(run(parameters, hidden[chunk], targets[chunk], divided))
        head.update(parameters)
    logprobs, entropies = zip(*parts, strict=True)
    return mx.concatenate(logprobs), mx.concatenate(entropies) if with_entropy else None


def surrogate_loss(logprobs, entropies, arrays, low: float, high: float):
    """Minus the clipped objective, k3 and minus the entropy bonus: see `batches/surrogate.py`.

    logprobs, entropies (or None): (N,) of the targets. arrays: those of a `Surrogate`.
    """
    old, ref, share, group, gain, kl_weight, entropy_weight = arrays
    moved = mx.zeros(len(gain), logprobs.dtype).at[group].add(share * (logprobs - old))
    ratio = mx.exp(moved)
    loss = -mx.minimum(ratio * gain, mx.clip(ratio, low, high) * gain).sum()
    # Elsewhere ref says nothing: its exp may overflow, and 0 times that is no number.
    gap = mx.where(kl_weight > 0, ref - logprobs, 0)
    loss = loss + (kl_weight * (mx.exp(gap) - gap - 1)).sum()
    return loss if entropies is None else loss - (entropy_weight * entropies).sum()


def _scores(model, hidden, targets, temperature, *_):
    return span_logprobs(model, hidden, targets, temperature, with_entropy=True)


def _weighted(model, hidden, targets, temperature, coefficients, surrogate, clip):
    with_entropy = clip is not None and clip[2]
    args = (model, hidden, targets, temperature)
    logprobs, entropies = span_logprobs(*args, with_entropy, recompute=True)
    loss = -(logprobs * coefficients).sum()
    if clip is not None:
        loss = loss + surrogate_loss(logprobs, entropies, surrogate, *clip[:2])
    return loss, logprobs


def _arrays(batch: RolloutBatch):
    inputs = Inputs.of(batch)
    targets = map(mx.array, (batch.target_index, batch.target_ids, batch.target_weight))
    temperature = None if batch.temperature is None else mx.array(batch.temperature)
    surrogate = [] if batch.surrogate is None else [*map(mx.array, batch.surrogate.arrays)]
    fields = (inputs.ids, inputs.mask, inputs.positions, inputs.is_latent, inputs.segments)
    return [fields, *targets, temperature, surrogate]
