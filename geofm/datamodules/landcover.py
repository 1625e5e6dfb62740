"""Data module of the labelled windows of the generated sample data."""

from collections.abc import Iterable, Sequence
from typing import Any

from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets.utils import Path

from geofm.datamodules.carried import NormalizingDataModule
from geofm.datamodules.targets import CheckedTargets
from geofm.datamodules.transfer import PlacesStay
from geofm.datamodules.units import WatchedUnits
from geofm.datasets.landcover import SampleLandCover
from geofm.sensors import BANDS


class SampleLandCoverDataModule(
    CheckedTargets, WatchedUnits, PlacesStay, NormalizingDataModule, NonGeoDataModule
):
    """Land cover of the sample data that ``geofm sample-data`` generates, split by ROI.

    The splits are those of SEN12MS-CR-TS. Batches are normalised on the device that they are on.
    """

    def __init__(
        self,
        paths: Path | Iterable[Path] = 'data/sample',
        batch_size: int = 64,
        num_workers: int = 0,
        window: int = 64,
        min_purity: float = 0.6,
        bands: Sequence[str] = BANDS,
        **kwargs: Any,
    ) -> None:
        """Initialize a new SampleLandCoverDataModule instance.

        Args:
            paths: Folders written by ``geofm sample-data``.
            batch_size: Number of windows in a batch.
            num_workers: Number of workers that read windows.
            window: Height and width of a window in pixels.
            min_purity: Fraction of a window that its class must cover, 0 to 1; 0 keeps all windows,
                e.g. for segmentation.
            bands: Names of the bands, in the order of the channels.
            **kwargs: Further arguments of `SampleLandCover`.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__(
            SampleLandCover,
            batch_size,
            num_workers,
            paths=paths,
            window=window,
            min_purity=min_purity,
            bands=bands,
            **kwargs,
        )
        self.normalize_by(tuple(bands))

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage, and normalise as the weights in use were trained.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        super().setup(stage)
        self.take_up_statistics()
