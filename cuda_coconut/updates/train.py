"""Steps: micro-batch gradients, their accumulation, the AdamW update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from coconut.batches.batch import Batch
from coconut.batches.results import LossSum, StepStats
from coconut.feedback.attached import prepare
from coconut.feedback.catalogue import GAINS
from coconut.feedback.weights import RULE_PREFIX
from coconut.world import World
from cuda_coconut.models.arrays import to_device
from cuda_coconut.models.base import Key
from cuda_coconut.models.shard import Shards, own_part
from cuda_coconut.thoughts.inputs import Inputs
from cuda_coconut.thoughts.latent import latent_forward
from cuda_coconut.updates.losses import masked_cross_entropy

_ALIGNED = 64
"""Elements that a gradient's place is a multiple of, so that kernels read it in whole vectors."""


class Trainer:
    """One model and its optimizer. feeds_back: latents receive thoughts, not their embedding.

    world: the processes that share the micro-batches. Each holds a copy of the model, or with shard
    a part of it.
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
        shard: bool = False,
    ):
        self.model = model
        self.n_traces = 0  # twin: nothing is compiled here
        self.world = world or World()
        self.shards = Shards(model, self.world) if shard else None
        self.device = next(model.parameters()).device
        self.feedback_rate = feedback_rate
        self.checkpointing = checkpointing
        self.betas, self.weight_decay = (0.9, beta2), weight_decay
        self.max_grad_norm = max_grad_norm
        self.bf16 = bf16
        self.feeds_back = feeds_back
        self._flat: torch.Tensor | None = None
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget the moments."""
        groups: dict[str, dict] = {
            "model": {"rate": 1.0},
            "rule": {"rate": self.feedback_rate},
            "gains": {"rate": self.feedback_rate, "weight_decay": 0.0},
        }
        for name, w in self.model.named_parameters():
            is_gain = name.removeprefix(RULE_PREFIX) in GAINS
            kind = "model" if not name.startswith(RULE_PREFIX) else "gains" if is_gain else "rule"
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
        world = self.world
        n_targets = sum(batch.n_targets for batch in micro_batches)
        n_tokens = sum(batch.n_tokens for batch in micro_batches)
        # Summed on the device: the host waits for none of it.
        counts = to_device(np.array([n_targets, n_tokens], np.float64), self.device)
        world.sum(counts)
        scale = (1 / counts[0].clamp(min=1)).float()
        loss_sum = torch.zeros((), device=self.device)
        self.join_gradients()
        for run in self._runs(micro_batches, dropout_key, progress):
            loss = run() if self.shards is None else self.shards(run)
            loss.backward(scale)
            loss_sum += loss.detach()
        if world.size > 1:
            world.sum(loss_sum)
        norm = self.update(lr)
        # The one point where the host waits for the device.
        loss_value, norm_value, *both = torch.stack([loss_sum, norm, *counts]).tolist()
        n_targets, n_tokens = map(round, both)
        return StepStats(loss_value, n_targets, norm_value, n_tokens)

    def _runs(
        self, micro_batches: Sequence[Batch], dropout_key: Key, progress: float
    ) -> Iterator[Callable[[], torch.Tensor]]:
        """For each micro-batch what computes its summed loss.

        Of a sharded model as many as any process has, each with as many passes as any has in it.
        """

        def loss_of(i: int) -> torch.Tensor:
            batch = micro_batches[i]
            prepared = self._prepare(batch, dropout_key, training=True, progress=progress)
            # Named by its number in the update: drops the same on however many processes.
            number = self.world.rank + i * self.world.size
            return self._loss_sum(batch, (*dropout_key, number), prepared)

        n_runs = [self._n_passes(batch) + 1 for batch in micro_batches]
        if self.shards is None:
            yield from (partial(loss_of, i) for i in range(len(n_runs)))
            return
        for i, most in enumerate(self.shards.agree(n_runs)):

            def run(i: int = i, most: int = most) -> torch.Tensor:
                assert self.shards is not None
                if i >= len(n_runs):
                    return self.shards.idle(most)
                n_missing = most - n_runs[i]
                return loss_of(i) + self.shards.idle(n_missing) if n_missing else loss_of(i)

            yield run

    def join_gradients(self) -> None:
        """Before a backward of several processes: let every gradient be a view into one array.

        It holds zeros, and `update` sums it. One sum behind the last backward instead of
        DistributedDataParallel: a weight's gradient is whole only when the first pass has been
        walked back, so little could overlap; a process without a micro-batch joins with zeros; and
        what is wanted is the sum, not a mean of means.
        """
        if self.world.size == 1 or self.shards is not None or self._flat is not None:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters]
        flat = torch.zeros(sum(sizes), device=self.device)
        for p, piece in zip(parameters, flat.split(sizes), strict=True):
            p.grad = piece[: p.numel()].view_as(p)
        self._flat = flat

    def update(self, lr: float) -> torch.Tensor:
        """AdamW on the gradients of all processes. Returns their norm before clipping."""
        if self._flat is not None:
            self.world.sum(self._flat)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in trained:
            if p.grad is None:  # a rule's weights at a stage without latents
                p.grad = torch.zeros_like(p)
        grads = [own_part(p.grad) for p in trained]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.shards is not None:
            norm = self.world.sum(norm.square()).sqrt()
        if self.max_grad_norm > 0:
            torch._foreach_mul_(grads, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        if self._flat is None:
            self.optimizer.zero_grad()
        else:
            self._flat.zero_()
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

    def _loss_sum(self, batch: Batch, key: Key, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
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
