"""Transfer of images to the device as integers, as they are stored in files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchgeo.datasets.utils import Sample

from geofm.sensors import sensor_channels

#: Types to try, half the size of float32.
_INTEGERS = (np.uint16, np.int16)


@dataclass(frozen=True)
class Narrowing:
    """Collate function that stores images as integers if this is exact.

    'image' becomes a list with a tensor (B, ..., C, H, W) per sensor, of type uint16 or int16 if
    that represents all values exactly, otherwise float32. This halves the amount of data to
    transfer. On the device, :func:`widen` converts the list to a float32 tensor.

    Attributes:
        collate: Collate function that makes a batch of samples.
        bands: Names of the channels.
    """

    collate: Callable[[Iterable[Sample]], Sample]
    bands: tuple[str, ...]

    def __call__(self, samples: Iterable[Sample]) -> Sample:
        """Make a batch.

        Args:
            samples: Samples with 'image'.

        Returns:
            The batch. Images that are not float32 are unchanged.
        """
        batch: dict[str, Any] = self.collate(samples)
        if batch['image'].dtype == torch.float32:
            batch['image'] = narrow(batch['image'], self.bands)
        return batch


def narrow(image: Tensor, bands: Sequence[str]) -> list[Tensor]:
    """Split images by sensor, and convert them to integers if this is exact.

    Args:
        image: Images, float32 (..., C, H, W), on the CPU.
        bands: Names of the channels.

    Returns:
        Images of each sensor in canonical order, uint16, int16 or float32.
    """
    groups = sensor_channels(bands).values()
    return [_narrowest(image[..., channels, :, :]) for channels in groups]


def _narrowest(image: Tensor) -> Tensor:
    values = image.numpy()
    for kind in _INTEGERS:
        # Usually the first image decides, and the others need not be checked.
        if all(_is_exact(part, kind) for part in (values[:1], values)):
            return torch.from_numpy(values.astype(kind))
    return image


def _is_exact(values: Any, kind: type[np.integer[Any]]) -> bool:
    # NaN and numbers out of range are cast to a different integer.
    with np.errstate(invalid='ignore'):
        return bool((values.astype(kind) == values).all())


def widen(parts: Sequence[Tensor], bands: Sequence[str]) -> Tensor:
    """Undo :func:`narrow`.

    Args:
        parts: Images of each sensor.
        bands: Names of the channels.

    Returns:
        Images, float32 (..., C, H, W), on the device of the parts.
    """
    *lead, _, height, width = parts[0].shape
    image = parts[0].new_empty((*lead, len(bands), height, width), dtype=torch.float32)
    for part, channels in zip(parts, sensor_channels(bands).values(), strict=True):
        first = channels[0]
        if channels == list(range(first, first + len(channels))):
            image[..., first : first + len(channels), :, :] = part
        else:
            image[..., channels, :, :] = part.float()
    return image
