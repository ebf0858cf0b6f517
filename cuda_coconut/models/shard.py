"""Shards: weights, gradients and moments spread over the processes of a run (torch's FSDP)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from coconut.world import World


class Shards(nn.Module):
    """A model of which every process holds a part; blocks are put together when they compute.

    Calling it runs a function of the whole model, once a micro-batch: what lies outside the blocks
    is gathered before and its gradients are summed and dealt out at the end of the backward pass.
    A block is gathered in every pass, forwards and backwards; its gradients are whole, in every
    process, from its last pass's backward until its first pass's, and then dealt out.
    """

    def __init__(self, model, world: World):
        # Takes seconds, which only a sharded run has to spend.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.model, self.world = model, world
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (world.size,))
        for block in model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            block.register_forward_pre_hook(_with_gradient, prepend=True)
        fully_shard(self, mesh=mesh, reshard_after_forward=False)
        for part in self._parts():
            # The sum: it has been divided by the targets of all processes already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        # A feedback rule's weights have no gradient where a process has no latents.
        self.set_reduce_scatter_unused_params(True, recurse=False)
        with torch.no_grad():
            self(lambda: None)  # before a block is used alone, which would take itself for the root
        self.reshard()

    def forward(self, run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """What `run` gives, while the weights outside the blocks are there."""
        return run()

    def agree(self, n_passes: Sequence[int]) -> list[int]:
        """Runs of the blocks that each micro-batch of an update needs in some process.

        n_passes: of this process's micro-batches. All processes must gather a block equally often.
        """
        others = self.world.exchange(list(n_passes))
        columns = [[n[i] for n in others if i < len(n)] for i in range(max(map(len, others)))]
        return [max(column) for column in columns]

    def idle(self, n_passes: int) -> torch.Tensor:
        """0, after as many passes over one token: another process gathers the blocks for more."""
        device = self.model.embedding.device
        position = torch.zeros((1, 1), dtype=torch.long, device=device)
        x = self.model.embed(position)
        for _ in range(n_passes):
            x = self.model.trunk(x, position)
        return 0 * x.sum()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every process holds all weights; to change them there changes nothing."""
        for part in self._parts():
            part.unshard()
        self._keep_after_forward(True)
        try:
            yield
        finally:
            self._keep_after_forward(False)
            for part in self._parts():
                part.reshard()

    def _keep_after_forward(self, keep: bool) -> None:
        for block in self.model.layers:
            block.set_reshard_after_forward(not keep)

    def _parts(self) -> list[nn.Module]:
        return [self, *self.model.layers]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this process may hold a part; every process must ask."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if _is_spread(tensor) else tensor


def spread_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that all processes have, on the device of another and in parts as it is."""
    tensor = tensor.to(like.device)
    if not _is_spread(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # No source: nothing has to travel.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _is_spread(tensor: torch.Tensor) -> bool:
    # A DTensor, told without its class: the module takes seconds to import.
    return hasattr(tensor, "device_mesh")


def _with_gradient(block: nn.Module, args: tuple) -> tuple:
    # FSDP gives a block back when the gradient of its input is there. Frozen embeddings have none,
    # thoughts may have: then processes would gather at different times and wait for ever.
    x, *rest = args
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *rest)
