"""Copies from the host to a device, and the precision of products there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, and wait for nothing.

    To a GPU it goes by way of pinned memory, which PyTorch keeps for the next copy: a copy out of
    pageable memory may wait for the work that the GPU was given before.

    Args:
        tensor: Tensor of any shape.
        device: The device.

    Returns:
        The same values there; *tensor* itself if that is where it lies.
    """
    if device.type == 'cuda' and tensor.is_cpu and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute products in the precision of their factors: neither autocast nor TF32.

    Args:
        device: Where they are computed.

    Yields:
        Nothing.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
