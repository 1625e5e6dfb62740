"""Batches on their way to the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Entries that a model or a loss takes, whatever their precision.
_TAKEN = ('image', 'valid', 'mask', 'label')


def stays_on_host(key: str, value: Any) -> bool:
    """Whether an entry of a batch says where its pixels lie, which no device needs to know.

    Coordinates are float64, which some devices, e.g. Apple's GPUs, do not have.

    Args:
        key: Name of the entry.
        value: The entry.

    Returns:
        True for float64 tensors other than images, masks and labels.
    """
    return isinstance(value, Tensor) and value.dtype == torch.float64 and key not in _TAKEN


def tensors_to(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Tensor]:
    """Move a batch to a device.

    Args:
        batch: Entries by name.
        device: The device.

    Returns:
        Its tensors; those for which :func:`stays_on_host` are left out.
    """
    return {
        key: value.to(device)
        for key, value in batch.items()
        if isinstance(value, Tensor) and not stays_on_host(key, value)
    }
