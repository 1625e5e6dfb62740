"""Random windows of patches."""

from pathlib import Path
from typing import Protocol, SupportsIndex

import torch
from rasterio.windows import Window
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample


class Pairs(Protocol):
    """Dataset of patches that can be read by window."""

    def __len__(self) -> int:
        """Return the number of patches."""

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Return height and width of a patch."""

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Return the files of a patch."""

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read a window of a patch."""


class RandomWindows(Dataset[Sample]):
    """One window of each patch, at a position that is drawn again each time.

    Positions are drawn from PyTorch's global generator. :class:`~geofm.datasets.Seeded`
    makes them depend only on seed, epoch and patch.
    """

    def __init__(self, dataset: Pairs, size: int) -> None:
        """Initialize a new RandomWindows instance.

        Args:
            dataset: The patches.
            size: Height and width of the windows in pixels. Along an axis in which a patch is
                smaller, the window spans the whole patch.
        """
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Read a random window of a patch.

        Args:
            index: Index of the patch.

        Returns:
            The sample, see :meth:`geofm.datasets.SEN12MSCRTS.read_pair`.

        Raises:
            IndexError: If there is no such patch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'patch {index} of {len(self)}: out of range')
        rows, cols = self.dataset.shape_of(index)
        height, width = min(self.size, rows), min(self.size, cols)
        first_row = int(torch.randint(rows - height + 1, ()))
        first_col = int(torch.randint(cols - width + 1, ()))
        return self.dataset.read_pair(index, Window(first_col, first_row, width, height))

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Return the files that a window is read from.

        Args:
            index: Index of the patch, 'index' of the sample.

        Returns:
            The files.
        """
        return self.dataset.files_of(index)
