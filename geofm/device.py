"""Copies from the host to a device, and precision of matrix products."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting.

    Copies to a GPU use pinned memory, which PyTorch caches. A copy from pageable memory could wait
    for earlier work on the GPU.

    Args:
        tensor: Tensor of any shape.
        device: The device.

    Returns:
        The tensor on the device; *tensor* itself if it is there already.
    """
    if device.type == 'cuda' and tensor.is_cpu and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def copy_beside[T](copy: Callable[[], T], device: torch.device) -> T:
    """Copy to a device, in parallel with computations if it is a GPU.

    The host is ahead of a GPU by up to one step, so the next batch is copied during the current
    step, on a separate stream.

    Args:
        copy: Function that makes asynchronous copies.
        device: The device.

    Returns:
        The result of *copy*. Later work on the device waits for the copies.
    """
    if device.type != 'cuda':
        return copy()
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copies = copy()
    current.wait_stream(stream)
    for leaf in tree_leaves(copies):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            # Do not reuse the memory for other copies while the current stream reads it.
            leaf.record_stream(current)
    return copies


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context without autocast and TF32, so that products have the precision of their inputs.

    Args:
        device: Device of the computation.

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
