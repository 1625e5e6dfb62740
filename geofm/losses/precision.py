"""Precision of losses, which need more than half precision."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64.

    Args:
        x: Floating-point tensor of any shape.

    Returns:
        The same values, in float32 or float64.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
