"""Data module of SEN12MS-CR-TS."""

from collections.abc import Sequence
from typing import Any

from geofm.datamodules.matched import AnySplit, MatchedDataModule
from geofm.datasets import SEN12MSCRTS
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
