"""Steps: micro-batch gradients, their accumulation, the AdamW update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from coconut.backend import LossSum, StepStats
from coconut.batch import Batch
from coconut.feedback import GAINS
from cuda_coconut.feedback import PREFIX, prepare
from cuda_coconut.latent import Inputs, latent_forward, to_device
from cuda_coconut.losses import masked_cross_entropy
from cuda_coconut.models.base import Key


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
        feedback_rate: float = 1.0,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.feedback_rate = feedback_rate
        self.checkpointing = checkpointing
        self.betas, self.weight_decay = (0.9, beta2), weight_decay
        self.max_grad_norm = max_grad_norm
        self.bf16 = bf16
        self.feeds_back = feeds_back
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        groups: dict[str, dict] = {
            "model": {"rate": 1.0},
            "rule": {"rate": self.feedback_rate},
            "gains": {"rate": self.feedback_rate, "weight_decay": 0.0},
        }
        for name, w in self.model.named_parameters():
            is_gain = name.removeprefix(PREFIX) in GAINS
            kind = "model" if not name.startswith(PREFIX) else "gains" if is_gain else "rule"
            if w.requires_grad:  # beside an adapter the model's own are frozen
                groups[kind].setdefault("params", []).append((name, w))
        self.optimizer = torch.optim.AdamW(
            [group for group in groups.values() if "params" in group],
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )

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
        n_targets = sum(batch.n_targets for batch in micro_batches)
        scale = torch.tensor(1 / max(n_targets, 1), device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches):
            prepared = self._prepare(batch, dropout_key, training=True, progress=progress)
            loss = self._loss_sum(batch, (*dropout_key, i), prepared)
            loss.backward(scale)
            loss_sum += loss.detach()
        norm = self.update(lr)
        # The one point where the host waits for the device.
        loss_value, norm_value = torch.stack([loss_sum, norm]).tolist()
        return StepStats(loss_value, n_targets, norm_value)

    def update(self, lr: float) -> torch.Tensor:
        """AdamW on the gradients. Returns their norm before clipping."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in trained:
            if p.grad is None:  # a rule's weights at a stage without latents
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in trained]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.max_grad_norm > 0:
            torch._foreach_mul_(grads, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model.feedback:
            self.model.feedback.version += 1
        return norm

    def loss(self, batch: Batch) -> LossSum:
        """Loss without dropout."""
        with torch.no_grad():
            loss = self._loss_sum(batch, None, self._prepare(batch, (0,)))
            return LossSum(loss.item(), batch.n_targets)

    def _prepare(self, batch: Batch, key: Key, **options) -> dict[str, torch.Tensor]:
        return prepare(self.model, batch, key, **options) if self.feeds_back else {}

    def _n_passes(self, batch: Batch) -> int:
        return batch.n_passes if self.feeds_back else 0

    def _loss_sum(
        self, batch: Batch, key: Key | None, prepared: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        index, targets, weights = (
            to_device(a, self.device)
            for a in (batch.target_index, batch.target_ids, batch.target_weight)
        )
        plan = (batch.first_latent, self._n_passes(batch))
        with self.compute_weights():
            inputs = Inputs.of(batch, self.device)
            options = {"key": key, "checkpointing": self.checkpointing, "prepared": prepared}
            hidden = latent_forward(self.model, inputs, *plan, **options).hidden
            # The head only where a label counts: it is a third of GPT-2 small's work.
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
            loss, _ = masked_cross_entropy(self.model.head(hidden), targets, weights)
        return loss

    @contextmanager
    def compute_weights(self) -> Iterator[None]:
        """With bf16: the model computes in bfloat16 inside, its float32 weights stay as they are.

        Autocast keeps the residual stream, norms and softmax in float32.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield
