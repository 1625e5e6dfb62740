"""Reflectance as models of pictures take it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: DN (reflectance x 10,000) that white of a picture of 8 bits stands for.
PICTURE_WHITE = 3000.0


class Picture(nn.Module):
    """Reflectance as the picture that models of ImageNet know: 0 is black, 1 is white.

    Args:
        white: DN (reflectance x 10,000) of white; what is brighter is white.
    """

    def __init__(self, white: float = PICTURE_WHITE) -> None:
        super().__init__()
        self.white = white

    def forward(self, image: Tensor) -> Tensor:
        """From DN to 0..1."""
        return (image / self.white).clamp(0, 1)

    def extra_repr(self) -> str:
        """Arguments to show in the printed module."""
        return f'white={self.white}'


class Standardize(nn.Module):
    """Take off a mean and divide by a standard deviation, channel by channel.

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
