"""Small data in place of those in the configurations."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geofm.sen12ms import PatchName
from tests.datasets.tree import grid_at, random_pixels, write_raster


class GeneratedImages(Dataset[dict[str, Tensor]]):
    """Random images in the format of TorchGeo's data sets."""

    def __init__(self, channels: int, key: str = 'image', length: int = 4, size: int = 48) -> None:
        """Initialize a new GeneratedImages instance.

        Args:
            channels: Number of channels, of all dates together.
            key: Key of the image in a sample.
            length: Number of images.
            size: Height and width in pixels.
        """
        self.key = key
        self.images = torch.rand(length, channels, size, size) * 3000

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return an image."""
        return {self.key: self.images[index].clone()}


def write_sen12mscr(root: Path) -> None:
    """Write SEN12MS-CR with four places of training ROIs, clear and cloudy."""
    for patch in range(4):
        grid = grid_at(32632, 500_000 + 320 * patch, 5_300_000, size=48)
        for i, kind in enumerate(('s1', 's2', 's2_cloudy')):
            name = PatchName('ROIs1868_summer', kind, 36, patch)
            pixels = random_pixels(kind[:2], grid, 10 * patch + i)
            write_raster(root / name.folder / name.filename, pixels, grid)
