"""Move batches to a device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Entries that are inputs of a model or a loss, whatever their precision.
_TAKEN = ('image', 'valid', 'mask', 'label')


def stays_on_host(key: str, value: Any) -> bool:
    """Check whether an entry of a batch holds coordinates, which stay on the host.

    Coordinates are float64, which some devices, e.g. Apple GPUs, do not support.

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
        Its tensors, without those for which :func:`stays_on_host` is true.
    """
    return {
        key: value.to(device)
        for key, value in batch.items()
        if isinstance(value, Tensor) and not stays_on_host(key, value)
    }
