"""Random windows of patches."""

from pathlib import Path
from typing import Protocol, SupportsIndex

import torch
from rasterio.windows import Window
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample


class Pairs(Protocol):
    """Patches of which windows can be read."""

    def __len__(self) -> int:
        """Number of patches."""

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Height and width of a patch."""

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Files of a patch."""

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read a window of a patch."""


class RandomWindows(Dataset[Sample]):
    """One window of each patch, at a random place that is drawn anew each time.

    Places come from PyTorch's generator: :class:`~geofm.datasets.seeded.Seeded` makes them
    a matter of seed, epoch and patch.
    """

    def __init__(self, dataset: Pairs, size: int) -> None:
        """Initialize a new RandomWindows instance.

        Args:
            dataset: The patches.
            size: Height and width of the windows in pixels. A patch that is smaller is read
                whole along that axis.
        """
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Read a random window of a patch.

        Args:
            index: Number of the patch.

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
        """Files behind a window.

        Args:
            index: Number of the patch, 'index' of the sample.

        Returns:
            The files.
        """
        return self.dataset.files_of(index)
