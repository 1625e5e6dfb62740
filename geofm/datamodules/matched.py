"""Base class of data modules of matched observations: of pairs and of archives."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.figure import Figure
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.datamodules.resumable import TIMEOUT, ResumableDataModule, StartMethod
from geofm.datamodules.sampling import run_seed
from geofm.datasets import EmptySplitError, MultiDate, RandomWindows, pad_and_stack
from geofm.datasets.pairs import MatchedDataset
from geofm.printing import warn

#: A split, or all samples.
AnySplit = Literal['train', 'val', 'test', 'all']


class MatchedDataModule(ResumableDataModule):
    """Data module of a :class:`~geofm.datasets.pairs.MatchedDataset`.

    Training samples are shuffled. Validation and testing use the samples of their splits in order,
    and prediction uses all samples. If the samples of a batch differ in size, smaller ones are
    padded, and 'valid' is False in the padding. Images are normalised band by band on the device.
    """

    collate_fn = staticmethod(pad_and_stack)

    def __init__(
        self,
        dataset_class: type[MatchedDataset],
        bands: Sequence[str],
        *,
        batch_size: int,
        num_workers: int,
        patch_size: int | None = None,
        n_dates: int | None = None,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        timeout: float = TIMEOUT,
        statistics: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new MatchedDataModule instance.

        Args:
            dataset_class: Class of the data sets.
            bands: Names of the bands, in the order of the channels.
            batch_size: Number of samples in a batch (on each device).
            num_workers: Number of worker processes that read samples.
            patch_size: Height and width in pixels of a window that is read at a random position of
                each training sample. By default whole samples are read.
            n_dates: Number of dates k of a place that are combined in a training sample, with
                'image' (k, C, H, W), see :class:`~geofm.datasets.MultiDate`. An epoch is then a
                pass over all places. By default each date is a sample of its own, as it always is
                in validation, testing and prediction.
            seed: Seed of the order of training samples and the positions of their windows. By
                default, the seed of Lightning's ``seed_everything``.
            start_method: Start method of worker processes. Default: Python's default.
            timeout: Maximum time in seconds for workers to load a batch. After that, the run ends
                with an error that lists the files being read. 0 for no limit.
            statistics: YAML file with mean and standard deviation of each band, as written by
                ``geofm stats``. By default, the statistics that the weights of the model were
                trained with, or else the built-in ones.
            **kwargs: Further arguments of the data sets.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *patch_size* or *n_dates* is not positive, or *statistics* cannot be
                read.
        """
        if patch_size is not None and patch_size < 1:
            raise ValueError(f'patch_size must be a positive number of pixels, not {patch_size}')
        if n_dates is not None and n_dates < 1:
            raise ValueError(f'n_dates must be at least 1, not {n_dates}')
        super().__init__(dataset_class, batch_size, num_workers, **kwargs)
        self.patch_size = patch_size
        self.n_dates = n_dates
        self.seed = run_seed(seed)
        self.start_method = start_method
        self.timeout = timeout
        self.normalize_by_file(bands, statistics)

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            DatasetNotFoundError: If there are no files.
            EmptySplitError: If a split is empty. For fitting, an empty validation split is only a
                warning.
        """
        super().setup(stage)
        if stage == 'fit':
            self.train_dataset = self._training_samples()
            try:
                self.val_dataset = self._samples('val')
            except EmptySplitError as err:
                self.val_dataset = None
                warn(f'fitting without validation: {err}')
        if stage == 'validate':
            self.val_dataset = self._samples('val')
        if stage == 'test':
            self.test_dataset = self._samples('test')
        if stage == 'predict':
            self.predict_dataset = self._samples('all')

    def plot(self, *args: Any, **kwargs: Any) -> Figure | None:
        """Plot a sample, see :meth:`geofm.datasets.pairs.MatchedDataset.plot`.

        Args:
            *args: Arguments passed to the dataset.
            **kwargs: Keyword arguments passed to the dataset.

        Returns:
            The figure; None before :meth:`setup`.
        """
        for dataset in (
            self.val_dataset,
            self.train_dataset,
            self.test_dataset,
            self.predict_dataset,
        ):
            samples = dataset.dataset if isinstance(dataset, RandomWindows) else dataset
            if isinstance(samples, MatchedDataset | MultiDate):
                return samples.plot(*args, **kwargs)
        return None

    @abstractmethod
    def _samples(self, split: AnySplit) -> MatchedDataset:
        """Make the data set of a split."""

    def _training_samples(self) -> Dataset[Sample]:
        """Make the data set of training samples, with windows and several dates if requested."""
        samples = self._samples('train')
        places = samples if self.n_dates is None else MultiDate(samples, self.n_dates)
        return places if self.patch_size is None else RandomWindows(places, self.patch_size)
