"""Collate samples of different sizes, and move batches to a device."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchgeo.datasets import stack_samples
from torchgeo.datasets.utils import Sample

#: Entries with pixels, whose last two axes are rows and columns.
PIXEL_KEYS = ('image', 'valid', 'mask')


def pad_and_stack(samples: Iterable[Sample], ignore_index: int = -1) -> Sample:
    """Stack samples, and pad the smaller ones at the bottom and right.

    Nothing is resampled: each pixel keeps its value, row and column. Samples that all have the same
    size are stacked without padding.

    Args:
        samples: Samples with 'image' (C, H, W) and, optionally, 'valid' bool (H, W) and 'mask' (H,
            W). Any other entry must have the same shape in all samples.
        ignore_index: Value of 'mask' in the padding.

    Returns:
        One sample whose entries have a leading batch axis. In the padding, 'image' is 0 and 'valid'
        is False. If sizes differ and no sample has 'valid', it is added.
    """
    samples = list(samples)
    heights, widths = zip(*(sample['image'].shape[-2:] for sample in samples), strict=True)
    size = max(heights), max(widths)
    if size == (min(heights), min(widths)):
        return stack_samples(samples)
    return stack_samples([_pad_sample(sample, size, ignore_index) for sample in samples])


def _pad_sample(sample: Sample, size: tuple[int, int], ignore_index: int) -> Sample:
    """Pad a sample to a height and width."""
    image = sample['image']
    valid = torch.ones(image.shape[-2:], dtype=torch.bool, device=image.device)
    fill = {'image': 0, 'valid': False, 'mask': ignore_index}
    return {
        key: _pad_to(value, size, fill[key]) if key in PIXEL_KEYS else value
        for key, value in {'valid': valid, **sample}.items()
    }


def _pad_to(pixels: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """Append rows below and columns to the right of pixels (..., H, W) up to a size."""
    height, width = pixels.shape[-2:]
    return pad(pixels, (0, size[1] - width, 0, size[0] - height), value=value)


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
