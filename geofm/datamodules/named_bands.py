"""Data module for any data set of Sentinel images, its bands by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate
from torchgeo.datamodules import BaseDataModule, GeoDataModule
from torchgeo.datasets.utils import Sample

from geofm.datamodules.resumable import TIMEOUT, ResumableDataModule, StartMethod
from geofm.datamodules.sampling import run_seed
from geofm.datamodules.targets import CheckedTargets
from geofm.datasets.collate import pad_and_stack
from geofm.datasets.named_bands import NamedBands, S1Unit, wanted_bands
from geofm.models import MultiSensorViT
from geofm.sensors import BandError, check_bands

#: Splits of a TorchGeo data module.
SPLITS = ('train', 'val', 'test', 'predict')


class NamedBandsDataModule(CheckedTargets, ResumableDataModule):
    """Data of a TorchGeo data module, or of data sets, with their bands matched by name.

    Name the channels in the order in which the data come, once. The model then gets its own
    bands in its own order, in dB and DN, normalised as all of this project's data are. Of the data
    module that is wrapped only the reading of samples is used: its normalisation and its
    augmentations are not applied.

    .. seealso:: :class:`geofm.datasets.NamedBands`
    """

    def __init__(
        self,
        source_bands: list[str] | dict[str, list[str]],
        datamodule: BaseDataModule | None = None,
        # Not Dataset[...]: of that jsonargparse does not find the arguments.
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
            source_bands: Names of the channels of 'image', in the order in which the data come;
                or, for each of several images under keys of their own, its names.
            datamodule: A TorchGeo data module; or else
            train_dataset: A data set to train on.
            val_dataset: A data set to validate on; none by default.
            bands: Names of the bands to give to the model. By default those that a model of this
                project has; for other models, all bands of the data in canonical order.
            scale: Factor that brings values to dB or DN, for all bands or by name: 10,000 for
                reflectances.
            s1_unit: Whether Sentinel-1 comes in 'dB', or as linear 'power', which becomes dB.
            n_dates: Number of dates that lie one after the other in the channels of 'image'.
            mean: Mean of bands by name, in dB and DN; by default that which the weights in use were
                trained with, or else that of :mod:`geofm.sensors`.
            std: Standard deviation of bands by name, likewise.
            batch_size: Number of samples in a batch (on each device); by default that of the data
                module, or 64.
            num_workers: Number of processes that read; by default that of the data module, or 0.
            seed: Seed of what is drawn for training samples; by default that of Lightning's
                ``seed_everything``.
            start_method: How processes that read are started; by default as Python does.
            timeout: Seconds that workers may take for a batch before the run ends, and names the
                files being read; 0 for no limit.

        Raises:
            BandError: If a band is unknown or given twice, or a wanted band is missing.
            ValueError: If not exactly one of *datamodule* and *train_dataset* is given.
        """
        if (datamodule is None) == (train_dataset is None):
            raise ValueError('give either a datamodule or a train_dataset')
        if datamodule is not None and val_dataset is not None:
            raise ValueError('the datamodule has a val_dataset of its own')
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
        self._asked = bands
        self._model_bands: tuple[str, ...] | None = None
        self._mean, self._std = mean or {}, std or {}
        unknown = sorted({*self._mean, *self._std} - set(self.available))
        if unknown:
            raise BandError(f'mean or std of {unknown}, but the data have {list(self.available)}')
        self._name_bands(bands)

    def prepare_data(self) -> None:
        """Let the data module that is wrapped download its data, if it was told to."""
        if self.source is not None:
            self.source.prepare_data()

    def setup(self, stage: str) -> None:
        """Make the data sets that a stage needs, and match the bands of the model.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            BandError: If the model has bands that the data lack, or not those asked for.
        """
        self._name_bands(self._match())
        super().setup(stage)
        if self.source is not None:
            self.source.setup(stage)
        for split in SPLITS:
            dataset = self._source_dataset(split)
            setattr(self, f'{split}_dataset', None if dataset is None else self._named(dataset))

    def match_bands(self, bands: Sequence[str]) -> None:
        """Give the bands of a model that the trainer of this data module does not know.

        Args:
            bands: Names of the model's bands, in its order.

        Raises:
            BandError: If others were asked for, or the data lack one.
        """
        self._model_bands = tuple(bands)
        self._name_bands(self._match())

    def train_dataloader(self) -> DataLoader[Sample]:
        """Training samples: shuffled, or as the sampler of a GeoDataModule says.

        Returns:
            The data loader.
        """
        dataset = self._valid_attribute('train_dataset')
        if isinstance(self.source, GeoDataModule):
            return self._source_loader('train', dataset)
        return self._training_loader(dataset, self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Validation samples in order.

        Returns:
            The data loader; none while fitting on a data set alone.
        """
        return [] if self.val_dataset is None else self._evaluation_loader('val')

    def test_dataloader(self) -> DataLoader[Sample]:
        """Test samples in order.

        Returns:
            The data loader.
        """
        return self._evaluation_loader('test')

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Prediction samples in order.

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
        """The loader of the data module that is wrapped, which knows its samplers, on our data."""
        source: Any = self.source
        name = f'{split}_dataset'
        raw = getattr(source, name)
        setattr(source, name, dataset)
        source.batch_size, source.num_workers = self.batch_size, self.num_workers
        # Windows at the borders of images are smaller.
        source.collate_fn = pad_and_stack
        source.trainer = self.trainer
        try:
            return getattr(source, f'{split}_dataloader')()
        finally:
            setattr(source, name, raw)

    def _source_dataset(self, split: str) -> Dataset[Any] | None:
        """The data set of a split, as it comes."""
        if self.source is None:
            return self._given.get(split)
        dataset = getattr(self.source, f'{split}_dataset')
        # One for all splits: it has no other samples to validate on.
        if dataset is None and split in ('train', 'predict'):
            dataset = self.source.dataset
        return dataset

    def _named(self, dataset: Dataset[Any]) -> NamedBands:
        return NamedBands(dataset, bands=self.bands, **self.kwargs)

    def _match(self) -> Sequence[str] | None:
        """Bands of the model; without one of this project, those asked for."""
        trainer = self.trainer
        modules = trainer.lightning_module.modules() if trainer and trainer.model else ()
        models = [module.bands for module in modules if isinstance(module, MultiSensorViT)]
        wanted = models[0] if models else self._model_bands
        if wanted is None:
            return self._asked
        if self._asked is not None and tuple(self._asked) != wanted:
            raise BandError(
                f'bands {list(self._asked)} asked for, but the model has {list(wanted)}'
            )
        return wanted

    def _name_bands(self, bands: Sequence[str] | None) -> None:
        """Set the bands to return, and what goes with them."""
        self.bands = wanted_bands(bands, self.available)
        self.normalize_by(self.bands, self._mean, self._std)
