"""Data modules of a table of rasters with a target."""

from collections.abc import Sequence
from typing import Any

from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets.utils import Path

from geofm.datamodules.carried import NormalizingDataModule
from geofm.datamodules.targets import CheckedTargets
from geofm.datamodules.transfer import PlacesStay
from geofm.datamodules.units import WatchedUnits
from geofm.datasets.archive.masked import MaskedArchive, TargetArchive
from geofm.datasets.splitting import SplitRule
from geofm.sensors import bands_of, check_bands


class TargetArchiveDataModule(
    CheckedTargets, WatchedUnits, PlacesStay, NormalizingDataModule, NonGeoDataModule
):
    """Any sensors of a table of rasters with a target.

    Batches are normalised on the device that they are on.
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
            table: Table of rasters, as ``geofm index`` writes it.
            sensors: Keys of the sensors of the images.
            bands: Names of the channels of the images; by default all of the sensors.
            batch_size: Number of samples in a batch.
            num_workers: Number of processes that read.
            split: How samples are split, the fields of
                :class:`~geofm.datasets.splitting.SplitRule`; by default by the column 'split' of
                the table.
            window_size: Height and width of the windows that are laid over each scene; whole
                scenes by default.
            statistics: YAML file with mean and standard deviation of each band, as of
                ``geofm stats``; None for those that the weights in use were trained with, or else
                those of the sensors.
            **kwargs: Further arguments of *dataset_class*.

        Raises:
            BandError: If a band is unknown or given twice.
            SensorError: If a sensor is unknown.
            ValueError: If *statistics* cannot be read, or *split* is no rule.
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
        """Make the data sets of a stage, and normalise as the weights in use were trained.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        super().setup(stage)
        self.take_up_statistics()


class MaskedArchiveDataModule(TargetArchiveDataModule):
    """Segmentation of any sensors of a table of rasters, one band of which holds the classes."""

    def __init__(
        self,
        table: Path,
        sensors: Sequence[str],
        mask: str,
        bands: Sequence[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        split: dict[str, Any] | None = None,
        window_size: int | None = None,
        statistics: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new MaskedArchiveDataModule instance.

        Args:
            table: Table of rasters, as ``geofm index`` writes it.
            sensors: Keys of the sensors of the images.
            mask: Name of the band of classes, e.g. ``'landcover.class'``, of a sensor of the table.
            bands: Names of the channels of the images; by default all of the sensors.
            batch_size: Number of samples in a batch.
            num_workers: Number of processes that read.
            split: How samples are split, the fields of
                :class:`~geofm.datasets.splitting.SplitRule`; by default by the column 'split' of
                the table.
            window_size: Height and width of the windows that are laid over each scene; whole
                scenes by default.
            statistics: YAML file with mean and standard deviation of each band, as of
                ``geofm stats``; None for those that the weights in use were trained with, or else
                those of the sensors.
            **kwargs: Further arguments of :class:`~geofm.datasets.archive.masked.MaskedArchive`.

        Raises:
            BandError: If a band is unknown or given twice.
            SensorError: If a sensor is unknown.
            ValueError: If *statistics* cannot be read, or *split* is no rule.
        """
        super().__init__(
            MaskedArchive,
            table,
            sensors,
            bands,
            batch_size,
            num_workers,
            split,
            window_size,
            statistics,
            mask=mask,
            **kwargs,
        )
