"""Samples of a table of rasters with a mask of classes that is one of the rasters."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, SupportsIndex

import torch
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.archive.dataset import RasterArchive, Split
from geofm.datasets.splitting import SplitRule
from geofm.datasets.table import RasterTable
from geofm.sensors import (
    BandError,
    bands_of,
    canonical_order,
    check_bands,
    date_columns,
    reference_sensor,
    sensor_of,
)

#: Class of pixels without one.
IGNORE = 255


class MaskedArchive(Dataset[Sample]):
    """Samples of a table of rasters, one band of which is the target.

    The raster of classes is a sensor of the table like the others, most often a user's own with
    ``quantity: other``, ``resampling: nearest`` and ``static: true``.

    Attributes:
        archive: The data set of the sensors and the target.
        sensors: Sensors of 'image', in canonical order.
        bands: Names of the channels of 'image'.
        mask: Name of the band of classes.
    """

    def __init__(
        self,
        table: RasterTable | Path,
        sensors: Sequence[str],
        mask: str,
        bands: Sequence[str] | None = None,
        split: Split = 'train',
        split_by: SplitRule | Mapping[str, Any] | None = None,
        reference: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new MaskedArchive instance.

        Args:
            table: A table of rasters, or its file.
            sensors: Keys of the sensors of 'image'.
            mask: Name of the band of classes, e.g. ``'landcover.class'``.
            bands: Names of the channels of 'image'; by default all of the sensors.
            split: One of 'train', 'val', 'test' or 'all'.
            split_by: How samples are split, as for :class:`~geofm.datasets.RasterArchive`.
            reference: The sensor that gives the grid; by default the reference of *sensors*.
            **kwargs: Further arguments of :class:`~geofm.datasets.RasterArchive`.

        Raises:
            BandError: If a band is unknown, or the mask is a band of 'image'.
            ValueError: As from :class:`~geofm.datasets.RasterArchive`.
        """
        self.sensors = canonical_order(sensors)
        self.bands = bands_of(self.sensors) if bands is None else check_bands(bands)
        (self.mask,) = check_bands([mask])
        if self.mask in self.bands:
            raise BandError(
                f"the mask '{self.mask}' is one of the bands of the image: leave it out"
            )
        every = canonical_order([*self.sensors, sensor_of(self.mask).name])
        self.archive = RasterArchive(
            table,
            every,
            [*self.bands, self.mask],
            reference or reference_sensor(self.sensors),
            split,
            split_by,
            **kwargs,
        )
        columns = date_columns(every)
        self._dates = [
            columns.index(key) if key in columns else -1 for key in date_columns(sensors)
        ]
        self._present = [every.index(key) for key in self.sensors]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.archive)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Number of the sample.

        Returns:
            As of :meth:`RasterArchive.read_pair`, 'image' without the band of classes, and 'mask'
            int64 (H, W), :data:`IGNORE` where a sensor or the classes have no data.
        """
        sample = dict(self.archive[index])
        image, classes = sample['image'][:-1], sample['image'][-1]
        classes = torch.where(sample['valid'], classes, IGNORE)
        unknown = torch.iinfo(torch.int64).min
        sample['dates'] = torch.tensor(
            [unknown if i < 0 else int(sample['dates'][i]) for i in self._dates]
        )
        if 'present' in sample:
            sample['present'] = sample['present'][self._present]
        return {**sample, 'image': image, 'mask': classes.long()}

    def files_of(self, index: int) -> list[FilePath]:
        """Files behind a sample.

        Args:
            index: Number of the sample.

        Returns:
            Their paths.
        """
        return [FilePath(path) for path in self.archive.files_of(index)]
