"""Samples of a table of rasters with a target that is a band of the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, SupportsIndex

import torch
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.splitting import Split, SplitRule
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

#: Class value of pixels without a class.
IGNORE = 255


class TargetArchive(Dataset[Sample]):
    """Samples of a table of rasters with a target, which may be one of its bands.

    Attributes:
        archive: The dataset of the sensors, and of the target if it is a band of the table.
        sensors: Keys of the sensors of 'image', in canonical order.
        bands: Names of the channels of 'image'.
        mask: Name of the band that is the target; None if it is not a band of the table.
    """

    def __init__(
        self,
        table: RasterTable | Path,
        sensors: Sequence[str],
        mask: str | None,
        bands: Sequence[str] | None = None,
        split: Split = 'train',
        split_by: SplitRule | Mapping[str, Any] | None = None,
        reference: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new TargetArchive instance.

        Args:
            table: A table of rasters, or its file.
            sensors: Keys of the sensors of 'image'.
            mask: Name of the band that is the target, e.g. ``'landcover.class'``, or None.
            bands: Names of the channels of 'image'. Default: all of the sensors.
            split: One of 'train', 'val', 'test' or 'all'.
            split_by: Rule by which samples are split, see :class:`~geofm.datasets.RasterArchive`.
            reference: The sensor on whose grid samples are read. Default: the reference of
                *sensors*.
            **kwargs: Further arguments of :class:`~geofm.datasets.RasterArchive`.

        Raises:
            BandError: If a band is unknown, or the mask is a band of 'image'.
            ValueError: See :class:`~geofm.datasets.RasterArchive`.
        """
        self.sensors = canonical_order(sensors)
        self.bands = bands_of(self.sensors) if bands is None else check_bands(bands)
        self.mask = None if mask is None else check_bands([mask])[0]
        if self.mask is not None and self.mask in self.bands:
            raise BandError(
                f"the mask '{self.mask}' is one of the bands of the image: remove it from bands"
            )
        targets = [] if self.mask is None else [self.mask]
        every = canonical_order([*self.sensors, *(sensor_of(band).name for band in targets)])
        self.archive = RasterArchive(
            table,
            every,
            [*self.bands, *targets],
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
        """Return the number of samples."""
        return len(self.archive)

    def read_image(self, index: SupportsIndex) -> Sample:
        """Read a sample before its target is computed from other files.

        Args:
            index: Index of the sample.

        Returns:
            The sample, see :meth:`RasterArchive.read_pair`, with the sensors of 'image' only. It
            contains 'target', float32 (H, W), only if the target is a band of the table.
        """
        sample = dict(self.archive[index])
        if self.mask is not None:
            sample['image'], sample['target'] = sample['image'][:-1], sample['image'][-1]
        unknown = torch.iinfo(torch.int64).min
        sample['dates'] = torch.tensor(
            [unknown if i < 0 else int(sample['dates'][i]) for i in self._dates]
        )
        if 'present' in sample:
            sample['present'] = sample['present'][self._present]
        return sample

    def files_of(self, index: int) -> list[FilePath]:
        """Return the files that a sample is read from.

        Args:
            index: Index of the sample.

        Returns:
            Their paths.
        """
        return [FilePath(path) for path in self.archive.files_of(index)]


class MaskedArchive(TargetArchive):
    """Samples of a table of rasters, one band of which is the target.

    The raster of classes is a sensor of the table like the others. It is usually defined by the
    user with ``quantity: other``, ``resampling: nearest`` and ``static: true``.

    Attributes:
        mask: Name of the band of classes.
    """

    mask: str

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample, see :meth:`RasterArchive.read_pair`, in which 'image' lacks the band of
            classes, with 'mask', int64 (H, W), :data:`IGNORE` where a sensor or the classes have no
            data.
        """
        sample = self.read_image(index)
        classes = torch.where(sample['valid'], sample.pop('target'), IGNORE)
        return {**sample, 'mask': classes.long()}
