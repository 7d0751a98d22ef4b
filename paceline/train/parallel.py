"""Data parallelism over the processes of torchrun; one process alone needs none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """This process's rank among `size`. Every method must be called by all of them in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Group:
        """The group that torchrun started this process in, if it did; on CUDA the process gets the GPU of its local rank."""
        if not dist.is_torchelastic_launched():
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Ends the group, all processes together; one that fails just ends, and torchrun ends the others."""
        if self.size > 1:
            dist.barrier()  # else a process may abort when it ends while another still holds its connection
            dist.destroy_process_group()

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all processes. Works on the host alone: it does not wait for GPUs."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, which are on the CPU, in all processes."""
        if self.size > 1:
            for each in tensors.values():
                dist.broadcast(each, 0)
        return tensors

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replaces gradients by their sums over all processes, with one all-reduce."""
        if self.size == 1:
            return
        gradients = [each.grad for each in parameters if each.grad is not None]
        flat = self.sum(torch.cat([each.flatten() for each in gradients]))
        parts = flat.split([each.numel() for each in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
