"""Data modules that read samples and their targets from a table of rasters."""

from collections.abc import Sequence
from typing import Any

from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets.utils import Path

from geofm.datamodules.carried import NormalizingDataModule
from geofm.datamodules.hooks import CheckedTargets, PlacesStay, WatchedUnits
from geofm.datasets import SplitRule
from geofm.datasets.archive import MaskedArchive, TargetArchive
from geofm.sensors import bands_of, check_bands


class TargetArchiveDataModule(
    CheckedTargets, WatchedUnits, PlacesStay, NormalizingDataModule, NonGeoDataModule
):
    """Data module of a table of rasters whose samples have targets.

    Batches are normalised on their device.
    """

    def __init__(
        self,
        dataset_class: type[TargetArchive],
        table: Path,
        sensors: Sequence[str],
        bands: Sequence[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        split: dict[str, Any] | None = None,
        window_size: int | None = None,
        statistics: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new TargetArchiveDataModule instance.

        Args:
            dataset_class: Class of the data set.
            table: Table of rasters written by ``geofm index``.
            sensors: Keys of the sensors of the images.
            bands: Names of the channels of the images; by default all bands of the sensors.
            batch_size: Number of samples in a batch.
            num_workers: Number of worker processes that read samples.
            split: How samples are split: the fields of
                :class:`~geofm.datasets.SplitRule`. By default by the column 'split' of
                the table.
            window_size: Height and width in pixels of the windows that each scene is divided into.
                By default whole scenes are samples.
            statistics: YAML file with mean and standard deviation of each band, as written by
                ``geofm stats``. By default, the statistics that the weights of the model were
                trained with, or else those of the sensors.
            **kwargs: Further arguments of *dataset_class*.

        Raises:
            BandError: If a band is unknown or given twice.
            SensorError: If a sensor is unknown.
            ValueError: If *statistics* cannot be read, or *split* is invalid.
        """
        self.bands = bands_of(sensors) if bands is None else check_bands(bands)
        super().__init__(
            dataset_class,  # type: ignore[arg-type]
            batch_size,
            num_workers,
            table=table,
            sensors=tuple(sensors),
            bands=self.bands,
            split_by=None if split is None else SplitRule(**split),
            window_size=window_size,
            **kwargs,
        )
        self.normalize_by_file(self.bands, statistics)

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage, and normalise with the statistics of the model's weights.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        super().setup(stage)
        self.take_up_statistics()


class MaskedArchiveDataModule(TargetArchiveDataModule):
    """Table of rasters for segmentation, with a band of the table as the mask."""

    def __init__(self, table: Path, sensors: Sequence[str], mask: str, **kwargs: Any) -> None:
        """Initialize a new MaskedArchiveDataModule instance.

        Args:
            table: Table of rasters written by ``geofm index``.
            sensors: Keys of the sensors of the images.
            mask: Name of a band of the table with the classes, e.g. ``'landcover.class'``.
            **kwargs: Further arguments of :class:`TargetArchiveDataModule`, and of
                :class:`~geofm.datasets.archive.MaskedArchive`.

        Raises:
            BandError: If a band is unknown or given twice.
            SensorError: If a sensor is unknown.
            ValueError: If *statistics* cannot be read, or *split* is invalid.
        """
        super().__init__(MaskedArchive, table, sensors, mask=mask, **kwargs)
