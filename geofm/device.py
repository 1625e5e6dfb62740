"""Copies from the host to a device, and the precision of products there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


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


def copy_beside[T](copy: Callable[[], T], device: torch.device) -> T:
    """Copy to a device, on a GPU beside what it computes.

    The host is ahead of a GPU by up to a step, so that the next batch is copied during this one's
    step, by hardware of its own.

    Args:
        copy: Makes the copies, asynchronously.
        device: The device.

    Returns:
        What *copy* returns. The work that is given to the device next waits for it.
    """
    if device.type != 'cuda':
        return copy()
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copies = copy()
    current.wait_stream(stream)
    for leaf in tree_leaves(copies):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            # Its memory must not serve another copy while this stream still reads it.
            leaf.record_stream(current)
    return copies


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
