"""Sums over the ranks of a run, so that a loss is that of the whole batch."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without ``torch.distributed``.

    Returns:
        The number.
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def reduced(value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks.

    Args:
        value: Tensor of the same shape on each rank.
        op: How to reduce.

    Returns:
        The same tensor on each rank; *value* itself on a single one.
    """
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, op)
    return value


def gathered(value: Tensor) -> Tensor:
    """Gather the rows of all ranks, without gradients.

    Args:
        value: Tensor of shape (N, ...), the same on each rank.

    Returns:
        Tensor of shape (ranks x N, ...), in order of the ranks.
    """
    if world_size() == 1:
        return value
    value = value.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)
