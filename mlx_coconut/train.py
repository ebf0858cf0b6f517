"""Compiled steps: micro-batch gradients, their lazy accumulation, the AdamW update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from coconut.backend import LossSum, StepStats
from coconut.batch import Batch
from mlx_coconut.latent import Inputs, latent_forward
from mlx_coconut.losses import masked_cross_entropy


class Trainer:
    """One model and its optimizer. feeds_back: latents receive thoughts, not their embedding."""

    def __init__(
        self,
        model,
        *,
        weight_decay: float,
        beta2: float = 0.999,
        max_grad_norm: float = 0.0,
        bf16: bool = False,
        feeds_back: bool = True,
        checkpointing: bool = False,
    ):
        self.model = model
        self.checkpointing = checkpointing
        self.betas, self.weight_decay = [0.9, beta2], weight_decay
        self.reset_optimizer()
        self.max_grad_norm = max_grad_norm
        self.bf16 = bf16
        self.feeds_back = feeds_back
        self.n_traces = 0
        self._micro: dict = {}
        self._loss: dict = {}

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        self.optimizer = optim.AdamW(
            1e-4, betas=self.betas, weight_decay=self.weight_decay, bias_correction=True
        )
        self.optimizer.init(self.model.trainable_parameters())
        self._update = None  # it was compiled over the old optimizer's state

    def step(
        self, micro_batches: Sequence[Batch], lr: float, dropout_key: tuple[int, ...]
    ) -> StepStats:
        """One update. dropout_key: host numbers that name this update's dropout."""
        n_targets = sum(batch.n_targets for batch in micro_batches)
        loss_sum, total = mx.array(0.0), None
        for i, batch in enumerate(micro_batches):
            loss, grads = self._call(self._micro, self._gradients, batch, _key(*dropout_key, i))
            loss_sum = loss_sum + loss
            total = grads if total is None else tree_map(mx.add, total, grads)
            # Once a micro-batch: unevaluated, the graphs (activations included) of all of them
            # would be alive at the update.
            mx.eval(loss_sum, total)
        del grads
        norm = self.update(total, 1 / max(n_targets, 1), lr)
        return StepStats(loss_sum.item(), n_targets, norm)

    def update(self, grads, scale: float, lr: float) -> float:
        """AdamW on the gradients. Returns their norm before clipping."""
        if self._update is None:
            self._update = self._compile_update()
        norm = self._update(grads, mx.array(scale), mx.array(lr))
        mx.eval(norm, self.model.state, self.optimizer.state)
        return norm.item()

    def loss(self, batch: Batch) -> LossSum:
        """Loss without dropout."""
        return LossSum(self._call(self._loss, self._loss_sum, batch).item(), batch.n_targets)

    def _call(self, compiled: dict, function, batch: Batch, *rest):
        """Call a function of (plan, weights, arrays...), compiled once a pass plan.

        New shapes retrace it by themselves.
        """
        plan = (batch.first_latent, batch.n_passes if self.feeds_back else 0)
        if plan not in compiled:

            def run(*args):
                self.n_traces += 1  # runs only while tracing
                return function(plan, *args)

            compiled[plan] = mx.compile(run)
        weights = self.model.parameters()
        try:
            return compiled[plan](weights, _arrays(batch), *rest)
        finally:
            self.model.update(weights)  # tracing leaves placeholders in the model

    def _gradients(self, plan, weights, arrays, dropout):
        def loss(weights):
            return self._loss_sum(plan, weights, arrays, dropout)

        return mx.value_and_grad(loss)(weights)

    def _loss_sum(self, plan, weights, arrays, dropout=None):
        ids, mask, positions, is_latent, index, targets, counts = arrays
        self.model.update(weights)
        with self.compute_weights():
            inputs = Inputs(ids, mask, positions, is_latent)
            hidden = latent_forward(self.model, inputs, *plan, dropout, self.checkpointing).hidden
            # The head only where a label counts: it is a third of GPT-2 small's work.
            hidden = hidden.reshape(-1, hidden.shape[-1])[index]
            loss, _ = masked_cross_entropy(self.model.head(hidden), targets, counts)
        return loss

    @contextmanager
    def compute_weights(self) -> Iterator[None]:
        """With bf16: the model computes in bfloat16 inside, its float32 weights come back after.

        Inside a gradient the casts are part of it, so gradients arrive in float32.
        """
        masters = self.model.parameters()
        if self.bf16:
            self.model.update(tree_map(lambda w: w.astype(mx.bfloat16), masters))
        try:
            yield
        finally:
            if self.bf16:
                self.model.update(masters)

    def _compile_update(self):
        state = [self.model.state, self.optimizer.state]

        def update(grads, scale, lr):
            self.n_traces += 1
            grads = tree_map(lambda g: g * scale, grads)
            norm = norm_of(grads)
            if self.max_grad_norm > 0:
                clip = mx.minimum(self.max_grad_norm / (norm + 1e-6), 1.0)
                grads = tree_map(lambda g: g * clip, grads)
            self.optimizer.learning_rate = lr
            self.optimizer.update(self.model, grads)
            return norm

        return mx.compile(update, inputs=state, outputs=state)


def norm_of(grads) -> mx.array:
    """L2 norm over all arrays of a tree."""
    # Rows first: MLX's CPU sum of one large array loses up to a tenth of it in float32.
    return mx.sqrt(sum((g * g).sum(axis=-1).sum() for _, g in tree_flatten(grads)))


def _arrays(batch: Batch) -> list[mx.array]:
    inputs = Inputs.of(batch)
    targets = map(mx.array, (batch.target_index, batch.target_ids, batch.target_weight))
    return [inputs.ids, inputs.mask, inputs.positions, inputs.is_latent, *targets]


def _key(*numbers: int) -> mx.array:
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return mx.random.key(int(seed))
