"""Data module that matches the bands of any data set by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate
from torchgeo.datamodules import BaseDataModule, GeoDataModule
from torchgeo.datasets.utils import Sample

from geofm.datamodules.hooks import CheckedTargets
from geofm.datamodules.resumable import TIMEOUT, ResumableDataModule, StartMethod
from geofm.datamodules.sampling import run_seed
from geofm.datasets import NamedBands, S1Unit, pad_and_stack, wanted_bands
from geofm.models import MultiSensorViT
from geofm.sensors import BandError, check_bands

#: Splits of a TorchGeo data module.
SPLITS = ('train', 'val', 'test', 'predict')


class NamedBandsDataModule(CheckedTargets, ResumableDataModule):
    """Wrapper of a TorchGeo data module, or of data sets, that matches bands by name.

    Give the names of the channels of the data, in their order. The model then gets the bands that
    it needs, in its own order, in dB and DN, and normalised by band name. The wrapped data module
    only reads samples. Its normalisation and augmentations are not applied.

    .. seealso:: :class:`geofm.datasets.NamedBands`
    """

    def __init__(
        self,
        source_bands: list[str] | dict[str, list[str]],
        datamodule: BaseDataModule | None = None,
        # Not Dataset[...], for which jsonargparse does not find the arguments.
        train_dataset: Dataset | None = None,  # type: ignore[type-arg]
        val_dataset: Dataset | None = None,  # type: ignore[type-arg]
        bands: Sequence[str] | None = None,
        scale: float | dict[str, float] = 1.0,
        s1_unit: S1Unit = 'dB',
        n_dates: int | None = None,
        mean: dict[str, float] | None = None,
        std: dict[str, float] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """Initialize a new NamedBandsDataModule instance.

        Args:
            source_bands: Names of the channels of 'image', in their order. If samples have several
                images, names of the channels of each image by its key.
            datamodule: TorchGeo data module. Give either this or *train_dataset*.
            train_dataset: Data set for training.
            val_dataset: Data set for validation; none by default.
            bands: Names of the bands for the model. By default, the bands of the model if it is a
                geofm model; for other models, all bands of the data in canonical order.
            scale: Factor that converts values to dB or DN, for all bands or by name, e.g. 10,000
                for reflectance.
            s1_unit: Unit of Sentinel-1 in the data: 'dB', or linear 'power', which is converted to
                dB.
            n_dates: Number of dates that are concatenated in the channels of 'image'.
            mean: Mean of bands by name, in dB and DN. By default, the means that the weights of the
                model were trained with, or else those of :mod:`geofm.sensors`.
            std: Standard deviation of bands by name, with the same default.
            batch_size: Number of samples in a batch (on each device); by default the batch size of
                the data module, or 64.
            num_workers: Number of worker processes that read samples; by default the number in the
                data module, or 0.
            seed: Seed of the order of training samples and of random numbers in their reading; by
                default the seed of Lightning's ``seed_everything``.
            start_method: Start method of worker processes. Default: Python's default.
            timeout: Maximum time in seconds for workers to load a batch. After that, the run ends
                with an error that lists the files being read. 0 for no limit.

        Raises:
            BandError: If a band is unknown or given twice, or a requested band is missing.
            ValueError: If not exactly one of *datamodule* and *train_dataset* is given.
        """
        if (datamodule is None) == (train_dataset is None):
            raise ValueError('give either a datamodule or a train_dataset')
        if datamodule is not None and val_dataset is not None:
            raise ValueError('val_dataset does not apply if a datamodule is given: leave it out')
        if datamodule is not None:
            batch_size = datamodule.batch_size if batch_size is None else batch_size
            num_workers = datamodule.num_workers if num_workers is None else num_workers
        super().__init__(
            NamedBands,
            64 if batch_size is None else batch_size,
            num_workers or 0,
            source_bands=source_bands,
            scale=scale,
            s1_unit=s1_unit,
            n_dates=n_dates,
        )
        self.source = datamodule
        self.collate_fn = getattr(datamodule, 'collate_fn', default_collate)
        self._given = {'train': train_dataset, 'val': val_dataset}
        self.seed = run_seed(seed)
        self.start_method = start_method
        self.timeout = timeout
        names = source_bands.values() if isinstance(source_bands, Mapping) else [source_bands]
        self.available = check_bands([band for image in names for band in image])
        self._requested = bands
        self._model_bands: tuple[str, ...] | None = None
        self._mean, self._std = mean or {}, std or {}
        unknown = sorted({*self._mean, *self._std} - set(self.available))
        if unknown:
            raise BandError(f'mean or std of {unknown}, but the data have {list(self.available)}')
        self._name_bands(bands)

    def prepare_data(self) -> None:
        """Prepare the data of the wrapped data module."""
        if self.source is not None:
            self.source.prepare_data()

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage, and match the bands of the model.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If a band of the model is missing in the data, or the model has other bands
                than those requested.
        """
        self._name_bands(self._match())
        super().setup(stage)
        if self.source is not None:
            self.source.setup(stage)
        for split in SPLITS:
            dataset = self._source_dataset(split)
            setattr(self, f'{split}_dataset', None if dataset is None else self._named(dataset))

    def match_bands(self, bands: Sequence[str]) -> None:
        """Match the bands to those of a model, for use without a trainer.

        Args:
            bands: Names of the bands of the model, in its order.

        Raises:
            BandError: If *bands* of the constructor differ from those of the model, or one is
                missing in the data.
        """
        self._model_bands = tuple(bands)
        self._name_bands(self._match())

    def train_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of training samples: shuffled, or with the GeoDataModule's sampler.

        Returns:
            The data loader.
        """
        dataset = self._valid_attribute('train_dataset')
        if isinstance(self.source, GeoDataModule):
            return self._source_loader('train', dataset)
        return self._training_loader(dataset, self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Make the data loader of validation samples.

        Returns:
            The data loader; an empty list if there is no validation data set.
        """
        return [] if self.val_dataset is None else self._evaluation_loader('val')

    def test_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of test samples.

        Returns:
            The data loader.
        """
        return self._evaluation_loader('test')

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of prediction samples.

        Returns:
            The data loader.
        """
        return self._evaluation_loader('predict')

    def _evaluation_loader(self, split: str) -> DataLoader[Sample]:
        dataset = self._valid_attribute(f'{split}_dataset')
        if isinstance(self.source, GeoDataModule):
            return self._source_loader(split, dataset)
        return self._ordered_loader(dataset, self.batch_size)

    def _source_loader(self, split: str, dataset: Dataset[Sample]) -> DataLoader[Sample]:
        """Make the loader of the wrapped data module, with its sampler, for our data set."""
        source: Any = self.source
        name = f'{split}_dataset'
        raw = getattr(source, name)
        setattr(source, name, dataset)
        source.batch_size, source.num_workers = self.batch_size, self.num_workers
        # Windows at the edges of images are smaller.
        source.collate_fn = pad_and_stack
        source.trainer = self.trainer
        try:
            return getattr(source, f'{split}_dataloader')()
        finally:
            setattr(source, name, raw)

    def _source_dataset(self, split: str) -> Dataset[Any] | None:
        """Return the original data set of a split."""
        if self.source is None:
            return self._given.get(split)
        dataset = getattr(self.source, f'{split}_dataset')
        # A GeoDataModule may have a single data set, which has no separate validation samples.
        if dataset is None and split in ('train', 'predict'):
            dataset = self.source.dataset
        return dataset

    def _named(self, dataset: Dataset[Any]) -> NamedBands:
        return NamedBands(dataset, bands=self.bands, **self.kwargs)

    def _match(self) -> Sequence[str] | None:
        """Return the bands of the model, or the requested bands if it is not geofm's."""
        trainer = self.trainer
        modules = trainer.lightning_module.modules() if trainer and trainer.model else ()
        models = [module.bands for module in modules if isinstance(module, MultiSensorViT)]
        wanted = models[0] if models else self._model_bands
        if wanted is None:
            return self._requested
        if self._requested is not None and tuple(self._requested) != wanted:
            raise BandError(
                f'bands {list(self._requested)} requested, but the model has {list(wanted)}'
            )
        return wanted

    def _name_bands(self, bands: Sequence[str] | None) -> None:
        """Set the bands to return, and their normalisation."""
        self.bands = wanted_bands(bands, self.available)
        self.normalize_by(self.bands, self._mean, self._std)
