"""Data module of SEN12MS-CR."""

from collections.abc import Sequence

from geofm.datamodules.resumable import TIMEOUT, StartMethod
from geofm.datamodules.sen12mscrts import SEN12MSCRTSDataModule
from geofm.datasets.pairs.dataset import OnError
from geofm.datasets.pairs.table import MIN_OVERLAP
from geofm.datasets.sen12mscr import SEN12MSCR, Sky
from geofm.sensors import BANDS


class SEN12MSCRDataModule(SEN12MSCRTSDataModule):
    """Pairs of Sentinel-1 and clear or cloudy Sentinel-2 patches from SEN12MS-CR.

    In all else this is :class:`SEN12MSCRTSDataModule`.

    .. seealso:: :class:`geofm.datasets.SEN12MSCR`
    """

    pairs_class = SEN12MSCR

    def __init__(
        self,
        paths: str | list[str] = 'data',
        batch_size: int = 64,
        num_workers: int = 0,
        bands: Sequence[str] = BANDS,
        sky: Sky = 'both',
        patch_size: int | None = None,
        n_dates: int | None = None,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        timeout: float = TIMEOUT,
        on_error: OnError = 'raise',
        catalogue: str | None = None,
        min_overlap: float = MIN_OVERLAP,
    ) -> None:
        """Initialize a new SEN12MSCRDataModule instance.

        Args:
            paths: Folders to search for pairs.
            batch_size: Number of samples in a batch (on each device).
            num_workers: Number of processes that read.
            bands: Names of the bands, in the order of the channels.
            sky: Which S2 images to use: 'clear', 'cloudy' or 'both'.
            patch_size: Height and width in pixels of the window that is read at a random place
                of each training patch; whole patches by default.
            n_dates: Number of pairs of a patch that make one training sample; 2 with both skies
                shows the model one place clear and cloudy.
            seed: Seed of the order of the training samples and of the places of their windows;
                by default that of Lightning's ``seed_everything``.
            start_method: How processes that read are started; by default as Python does.
            timeout: Seconds that workers may take for a batch before the run ends, and names the
                files being read; 0 for no limit.
            on_error: What to do about a pair that cannot be read: 'raise', or 'skip' it, read
                another one and report that at the end of the epoch.
            catalogue: Catalogue of the folder *paths*, if it does not lie where it is looked for.
            min_overlap: As of :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *patch_size* or *n_dates* is not positive.
        """
        super().__init__(
            paths,
            batch_size,
            num_workers,
            bands,
            patch_size=patch_size,
            n_dates=n_dates,
            seed=seed,
            start_method=start_method,
            timeout=timeout,
            sky=sky,
            on_error=on_error,
            catalogue=catalogue,
            min_overlap=min_overlap,
        )
