"""Data module of SEN12MS-CR-TS."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset
from torchgeo.datamodules import BaseDataModule
from torchgeo.datasets.utils import Sample

from geofm.datasets import SEN12MSCRTS, EmptySplitError, pad_and_stack
from geofm.datasets.regions import Split
from geofm.sensors import BANDS, band_statistics
from geofm.transforms import Normalize


class RandomWindows(Dataset[Sample]):
    """One window of each pair, at a random place that is drawn anew each time.

    Places come from PyTorch's generator, which the data loader seeds for each worker.
    """

    def __init__(self, dataset: SEN12MSCRTS, size: int) -> None:
        """Initialize a new RandomWindows instance.

        Args:
            dataset: The pairs.
            size: Height and width of the windows in pixels. A patch that is smaller is read
                whole along that axis.
        """
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Read a random window of a pair.

        Args:
            index: Number of the pair.

        Returns:
            The sample, see :meth:`geofm.datasets.SEN12MSCRTS.read_pair`.

        Raises:
            IndexError: If there is no such pair.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'pair {index} of {len(self)}: out of range')
        row = self.dataset.index.iloc[index]
        height, width = min(self.size, row['height']), min(self.size, row['width'])
        first_row = int(torch.randint(row['height'] - height + 1, ()))
        first_col = int(torch.randint(row['width'] - width + 1, ()))
        return self.dataset.read_pair(index, Window(first_col, first_row, width, height))


class SEN12MSCRTSDataModule(BaseDataModule):
    """Pairs of Sentinel-1 and Sentinel-2 patches from SEN12MS-CR-TS.

    Training shuffles the pairs; validation and testing take those of the official ROIs in
    order, and prediction all of them. The patches of a batch may differ in size: smaller ones
    are padded, and 'valid' says where. Images are normalised band by band on the device.

    .. seealso:: :class:`geofm.datasets.SEN12MSCRTS`
    """

    def __init__(
        self,
        paths: str | list[str] = 'data',
        batch_size: int = 64,
        num_workers: int = 0,
        bands: Sequence[str] = BANDS,
        regions: Sequence[str] | None = None,
        patch_size: int | None = None,
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
            **kwargs: Further arguments of :class:`~geofm.datasets.SEN12MSCRTS`.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *patch_size* is not positive.
        """
        if patch_size is not None and patch_size < 1:
            raise ValueError(f'patch_size must be a positive number of pixels, not {patch_size}')
        super().__init__(
            SEN12MSCRTS,
            batch_size,
            num_workers,
            paths=paths,
            bands=tuple(bands),
            regions=regions,
            **kwargs,
        )
        self.patch_size = patch_size
        # TorchGeo's tasks take these to undo the normalisation for plots.
        self.mean, self.std = band_statistics(bands)
        self.aug = Normalize(bands)

    def setup(self, stage: str) -> None:
        """Find the pairs of the splits that a stage needs.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            DatasetNotFoundError: If there are no files.
            EmptySplitError: If a split has no pair. Only fitting does without a validation
                split, with a warning.
        """
        if stage == 'fit':
            pairs = self._pairs('train')
            self.train_dataset = (
                pairs if self.patch_size is None else RandomWindows(pairs, self.patch_size)
            )
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
        dataset = self._valid_attribute('train_dataset')
        devices = self.trainer.world_size if self.trainer else 1
        full = len(dataset) // devices >= self.batch_size
        return self._loader(dataset, shuffle=True, drop_last=full)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Validation pairs in order.

        Returns:
            The data loader; none while fitting on a tree without validation ROIs.
        """
        return [] if self.val_dataset is None else self._loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Test pairs in order.

        Returns:
            The data loader.
        """
        return self._loader(self._valid_attribute('test_dataset'))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """All pairs in order.

        Returns:
            The data loader.
        """
        return self._loader(self._valid_attribute('predict_dataset'))

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
            pairs = dataset.dataset if isinstance(dataset, RandomWindows) else dataset
            if isinstance(pairs, SEN12MSCRTS):
                return pairs.plot(*args, **kwargs)
        return None

    def _pairs(self, split: Split) -> SEN12MSCRTS:
        """The pairs of a split."""
        return SEN12MSCRTS(split=split, **self.kwargs)

    def _loader(
        self, dataset: Dataset[Sample], *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Sample]:
        """A data loader of pairs by number, to which Lightning can add a distributed sampler."""
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=pad_and_stack,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
