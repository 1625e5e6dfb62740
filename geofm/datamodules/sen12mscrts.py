"""Data modules of SEN12MS-CR-TS and SEN12MS-CR."""

from collections.abc import Sequence
from typing import Any

from geofm.datamodules.matched import AnySplit, MatchedDataModule
from geofm.datamodules.resumable import TIMEOUT, StartMethod
from geofm.datasets import SEN12MSCR, SEN12MSCRTS, Sky
from geofm.datasets.pairs import MIN_OVERLAP, OnError
from geofm.sensors import BANDS


class SEN12MSCRTSDataModule(MatchedDataModule):
    """Pairs of Sentinel-1 and Sentinel-2 patches from SEN12MS-CR-TS.

    Training pairs are shuffled. Validation and testing use the pairs of the official ROIs in order,
    prediction uses all pairs. If the patches of a batch differ in size, smaller ones are padded,
    and 'valid' is False in the padding. Images are normalised band by band on the device.

    .. seealso:: :class:`geofm.datasets.SEN12MSCRTS`
    """

    pairs_class: type[SEN12MSCRTS] = SEN12MSCRTS

    def __init__(
        self,
        paths: str | list[str] = 'data',
        batch_size: int = 64,
        num_workers: int = 0,
        bands: Sequence[str] = BANDS,
        regions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new SEN12MSCRTSDataModule instance.

        Args:
            paths: Folders to search for pairs.
            batch_size: Number of pairs in a batch (on each device).
            num_workers: Number of worker processes that read samples.
            bands: Names of the bands, in the order of the channels.
            regions: World regions to use; all by default.
            **kwargs: Further arguments of :class:`~geofm.datamodules.matched.MatchedDataModule`,
                and of :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *patch_size* or *n_dates* is not positive, or *statistics* cannot be
                read.
        """
        if regions is not None:
            kwargs['regions'] = regions
        super().__init__(
            self.pairs_class,
            bands,
            batch_size=batch_size,
            num_workers=num_workers,
            paths=paths,
            **kwargs,
        )
        self.kwargs['bands'] = tuple(bands)

    def _samples(self, split: AnySplit) -> SEN12MSCRTS:
        """Make the data set of a split."""
        return self.pairs_class(split=split, **self.kwargs)


class SEN12MSCRDataModule(SEN12MSCRTSDataModule):
    """Pairs of Sentinel-1 and clear or cloudy Sentinel-2 patches from SEN12MS-CR.

    Otherwise it is like :class:`SEN12MSCRTSDataModule`.

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
            num_workers: Number of worker processes that read samples.
            bands: Names of the bands, in the order of the channels.
            sky: Which Sentinel-2 images to use: 'clear', 'cloudy' or 'both'.
            patch_size: Height and width in pixels of a window that is read at a random position of
                each training patch. By default whole patches are read.
            n_dates: Number of pairs of a patch that are combined in a training sample. With 2 and
                both skies, the model sees each place clear and cloudy.
            seed: Seed of the order of training samples and the positions of their windows. By
                default, the seed of Lightning's ``seed_everything``.
            start_method: Start method of worker processes. Default: Python's default.
            timeout: Maximum time in seconds for workers to load a batch. After that, the run ends
                with an error that lists the files being read. 0 for no limit.
            on_error: What to do if a pair cannot be read: 'raise' an error, or 'skip' it. Skipped
                pairs are replaced by others, and reported at the end of each epoch.
            catalogue: Catalogue of the folder *paths*, if it is not at its default location.
            min_overlap: See :class:`~geofm.datasets.SEN12MSCRTS`.

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
