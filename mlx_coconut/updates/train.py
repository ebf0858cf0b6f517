"""Compiled steps: micro-batch gradients, their lazy accumulation, the AdamW update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from coconut.batches.batch import Batch
from coconut.batches.results import LossSum, StepStats
from coconut.feedback.attached import prepare
from coconut.feedback.catalogue import GAINS
from coconut.world import World
from mlx_coconut.models.weights import feedback_weights
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import latent_forward
from mlx_coconut.updates.losses import masked_cross_entropy


class Trainer:
    """One model and its optimizer. feeds_back: latents receive thoughts, not their embedding.

    world: the processes that each hold a copy of the model and share the micro-batches.
    """

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
        feedback_rate: float = 1.0,
        world: World | None = None,
    ):
        self.model = model
        self.world = world or World()
        self.feedback_rate = feedback_rate
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
        self,
        micro_batches: Sequence[Batch],
        lr: float,
        dropout_key: tuple[int, ...],
        progress: float = 0.0,
    ) -> StepStats:
        """One update. dropout_key: host numbers that name its draws, its number in the epoch last.

        progress: share of the run that is done.
        """
        feedback = self.model.feedback
        if feedback and feedback.rule.refresh == 0 and dropout_key[-1] == 0:
            feedback.inverses.forget()
        loss_sum, total, grads = mx.array(0.0), None, None
        for i, batch in enumerate(micro_batches):
            prepared = self._prepare(batch, dropout_key, training=True, progress=progress)
            # Named by its number in the update: drops the same on however many processes.
            rest = (prepared, _key(*dropout_key, self.world.rank + i * self.world.size))
            loss, grads = self._call(self._micro, self._gradients, batch, *rest)
            loss_sum = loss_sum + loss
            total = grads if total is None else tree_map(mx.add, total, grads)
            # Once a micro-batch: unevaluated, the graphs (activations included) of all of them
            # would be alive at the update.
            mx.eval(loss_sum, total)
        del grads
        n_targets = sum(batch.n_targets for batch in micro_batches)
        n_tokens = sum(batch.n_tokens for batch in micro_batches)
        if self.world.size > 1:
            if total is None:  # a short last update: nothing to do but join the sums
                total = tree_map(mx.zeros_like, self.model.trainable_parameters())
            # Of one type, so that they travel together; exact up to 2^24.
            counts = mx.array([n_targets, n_tokens], mx.float32)
            loss_sum, counts, total = self.world.sum((loss_sum, counts, total))
            mx.eval(loss_sum, counts, total)
            n_targets, n_tokens = map(round, counts.tolist())
        norm = self.update(total, 1 / max(n_targets, 1), lr)
        return StepStats(loss_sum.item(), n_targets, norm, n_tokens)

    def update(self, grads, scale: float, lr: float) -> float:
        """AdamW on the gradients of all processes. Returns their norm before clipping."""
        if self._update is None:
            self._update = self._compile_update()
        norm = self._update(grads, mx.array(scale), mx.array(lr))
        if self.model.feedback:
            self.model.feedback.version += 1
        mx.eval(norm, self.model.state, self.optimizer.state)
        return norm.item()

    def loss(self, batch: Batch) -> LossSum:
        """Loss without dropout."""
        prepared = self._prepare(batch, (0,))
        loss = self._call(self._loss, self._loss_sum, batch, prepared)
        return LossSum(loss.item(), batch.n_targets)

    def _prepare(self, batch: Batch, key: tuple[int, ...], **options) -> dict[str, mx.array]:
        return prepare(self.model, batch, key, **options) if self.feeds_back else {}

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

    def _gradients(self, plan, weights, arrays, prepared, dropout):
        def loss(trained):
            return self._loss_sum(plan, trained, arrays, prepared, dropout)

        self.model.update(weights)
        return mx.value_and_grad(loss)(self.model.trainable_parameters())

    def _loss_sum(self, plan, weights, arrays, prepared, dropout=None):
        ids, mask, positions, is_latent, index, targets, counts = arrays
        self.model.update(weights)
        with self.compute_weights():
            inputs = Inputs(ids, mask, positions, is_latent)
            options = {"key": dropout, "checkpointing": self.checkpointing, "prepared": prepared}
            hidden = latent_forward(self.model, inputs, *plan, **options).hidden
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
            self.model.update(tree_map(_as_bfloat16, masters))
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
            before = feedback_weights(self.model)
            self.optimizer.update(self.model, grads)
            if before:
                self.model.feedback.set_weights(self._moved(before, lr))
            return norm

        return mx.compile(update, inputs=state, outputs=state)

    def _moved(self, before: dict[str, mx.array], lr: mx.array) -> dict[str, mx.array]:
        """The rule's weights after an update at their own rate; gains do not decay.

        AdamW's step is proportional to its rate, so it is scaled afterwards.
        """
        after = feedback_weights(self.model)
        decay = {n: lr * self.weight_decay * (n in GAINS) for n in before}
        return {
            n: w + self.feedback_rate * (after[n] - w + decay[n] * w) for n, w in before.items()
        }


def _as_bfloat16(w: mx.array) -> mx.array:
    # Quantised weights are packed whole numbers.
    return w.astype(mx.bfloat16) if mx.issubdtype(w.dtype, mx.floating) else w


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
