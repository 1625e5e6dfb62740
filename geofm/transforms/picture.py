"""Conversion of DN to brightness from 0 to 1, and standardisation, for models of photographs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: DN (reflectance x 10,000) that is shown as white.
PICTURE_WHITE = 3000.0


class Picture(nn.Module):
    """Convert DN to brightness from 0 (black) to 1 (white), for models trained on ImageNet.

    Args:
        white: DN (reflectance x 10,000) of white. Higher values are clipped.
    """

    def __init__(self, white: float = PICTURE_WHITE) -> None:
        super().__init__()
        self.white = white

    def forward(self, image: Tensor) -> Tensor:
        """Convert DN to brightness from 0 to 1."""
        return (image / self.white).clamp(0, 1)

    def extra_repr(self) -> str:
        """Return the arguments, for the string representation of the module."""
        return f'white={self.white}'


class Standardize(nn.Module):
    """Subtract the mean of each channel and divide by its standard deviation.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Standardise images (..., C, H, W)."""
        return (image - self.mean) / self.std
