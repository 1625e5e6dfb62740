"""Data module of SEN12MS-CR-TS."""

import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets.utils import Sample

from geofm.datamodules.resumable import ResumableDataModule, StartMethod
from geofm.datamodules.sampling import run_seed
from geofm.datasets import SEN12MSCRTS, EmptySplitError, MultiDate, pad_and_stack
from geofm.datasets.regions import Split
from geofm.datasets.statistics import read_statistics
from geofm.datasets.windows import RandomWindows
from geofm.sensors import BANDS


class SEN12MSCRTSDataModule(ResumableDataModule):
    """Pairs of Sentinel-1 and Sentinel-2 patches from SEN12MS-CR-TS.

    Training shuffles the pairs; validation and testing take those of the official ROIs in
    order, and prediction all of them. The patches of a batch may differ in size: smaller ones
    are padded, and 'valid' says where. Images are normalised band by band on the device.

    .. seealso:: :class:`geofm.datasets.SEN12MSCRTS`
    """

    collate_fn = staticmethod(pad_and_stack)
    pairs_class: type[SEN12MSCRTS] = SEN12MSCRTS

    def __init__(
        self,
        paths: str | list[str] = 'data',
        batch_size: int = 64,
        num_workers: int = 0,
        bands: Sequence[str] = BANDS,
        regions: Sequence[str] | None = None,
        patch_size: int | None = None,
        n_dates: int | None = None,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        statistics: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new SEN12MSCRTSDataModule instance.

        Args:
            paths: Folders to search for pairs.
            batch_size: Number of pairs in a batch (on each device).
            num_workers: Number of processes that read.
            bands: Names of the bands, in the order of the channels.
            regions: World regions to keep, all by default.
            patch_size: Height and width in pixels of the window that is read at a random place
                of each training pair; whole patches by default.
            n_dates: Number of dates k of a patch that make one training sample, 'image'
                (k, C, H, W), see :class:`~geofm.datasets.MultiDate`. An epoch is then one pass
                over the patches. By default, each pair is a sample of its own, as it always is in
                validation, testing and prediction.
            seed: Seed of the order of the training samples and of the places of their windows;
                by default that of Lightning's ``seed_everything``.
            start_method: How processes that read are started; by default as Python does.
            statistics: YAML file with mean and standard deviation of each band, as ``geofm stats``
                writes it; by default those that the weights in use were trained with, or else those
                of SEN12MS-CR-TS.
            **kwargs: Further arguments of :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *patch_size* or *n_dates* is not positive, or *statistics* cannot be
                read.
        """
        if patch_size is not None and patch_size < 1:
            raise ValueError(f'patch_size must be a positive number of pixels, not {patch_size}')
        if n_dates is not None and n_dates < 1:
            raise ValueError(f'n_dates must be at least 1, not {n_dates}')
        if regions is not None:
            kwargs['regions'] = regions
        super().__init__(
            self.pairs_class,
            batch_size,
            num_workers,
            paths=paths,
            bands=tuple(bands),
            **kwargs,
        )
        self.patch_size = patch_size
        self.n_dates = n_dates
        self.seed = run_seed(seed)
        self.start_method = start_method
        given: tuple[dict[str, float], ...] = ()
        if statistics is not None:
            values = (v.tolist() for v in read_statistics(statistics, bands))
            given = tuple(dict(zip(bands, v, strict=True)) for v in values)
        self.normalize_by(tuple(bands), *given)

    def setup(self, stage: str) -> None:
        """Find the pairs of the splits that a stage needs.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            DatasetNotFoundError: If there are no files.
            EmptySplitError: If a split has no pair. Only fitting does without a validation
                split, with a warning.
        """
        self.take_up_statistics()
        if stage == 'fit':
            self.train_dataset = self._training_samples()
            try:
                self.val_dataset = self._pairs('val')
            except EmptySplitError as err:
                self.val_dataset = None
                warnings.warn(f'fitting without validation: {err}', UserWarning, stacklevel=2)
        if stage == 'validate':
            self.val_dataset = self._pairs('val')
        if stage == 'test':
            self.test_dataset = self._pairs('test')
        if stage == 'predict':
            self.predict_dataset = self._pairs('all')

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled training pairs.

        The last batch is left off if it is not full, unless it is the only one.

        Returns:
            The data loader.
        """
        return self._training_loader(self._valid_attribute('train_dataset'), self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Validation pairs in order.

        Returns:
            The data loader; none while fitting on a tree without validation ROIs.
        """
        if self.val_dataset is None:
            return []
        return self._ordered_loader(self.val_dataset, self.batch_size)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Test pairs in order.

        Returns:
            The data loader.
        """
        return self._ordered_loader(self._valid_attribute('test_dataset'), self.batch_size)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """All pairs in order.

        Returns:
            The data loader.
        """
        return self._ordered_loader(self._valid_attribute('predict_dataset'), self.batch_size)

    def plot(self, *args: Any, **kwargs: Any) -> Figure | None:
        """Draw a sample, see :meth:`geofm.datasets.SEN12MSCRTS.plot`.

        Args:
            *args: Arguments passed to the dataset.
            **kwargs: Keyword arguments passed to the dataset.

        Returns:
            The figure, or None before :meth:`setup`.
        """
        for dataset in (
            self.val_dataset,
            self.train_dataset,
            self.test_dataset,
            self.predict_dataset,
        ):
            patches = dataset.dataset if isinstance(dataset, RandomWindows) else dataset
            if isinstance(patches, SEN12MSCRTS | MultiDate):
                return patches.plot(*args, **kwargs)
        return None

    def _pairs(self, split: Split) -> SEN12MSCRTS:
        """The pairs of a split."""
        return self.pairs_class(split=split, **self.kwargs)

    def _training_samples(self) -> Dataset[Sample]:
        """The training pairs, or their windows, or several dates of these."""
        pairs = self._pairs('train')
        patches = pairs if self.n_dates is None else MultiDate(pairs, self.n_dates)
        return patches if self.patch_size is None else RandomWindows(patches, self.patch_size)
