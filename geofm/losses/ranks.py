"""Collectives over ranks, so that losses are computed from the whole batch."""

import torch.distributed as dist
from lightly.utils.dist import world_size
from torch import Tensor


def reduced(value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks.

    Args:
        value: Tensor of the same shape on each rank.
        op: Reduction operation.

    Returns:
        The reduced tensor, equal on all ranks; *value* itself if there is one rank.
    """
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, op)
    return value


def gathered(value: Tensor) -> Tensor:
    """Gather the shards of a tensor; all ranks take part.

    Args:
        value: A tensor, sharded (a ``DTensor``) or not.

    Returns:
        The whole tensor on each rank; *value* itself if it is not sharded.
    """
    whole: Tensor = value.full_tensor() if hasattr(value, 'full_tensor') else value
    return whole
