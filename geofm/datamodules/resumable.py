"""Base class of data modules whose training can be resumed within an epoch."""

import multiprocessing
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets import stack_samples
from torchgeo.datasets.utils import Sample

from geofm.datamodules.carried import NormalizingDataModule
from geofm.datamodules.hooks import PlacesStay, WatchedUnits
from geofm.datamodules.narrow import Narrowing, widen
from geofm.datamodules.sampling import (
    RecountBatches,
    ResumableLoader,
    ResumableSampler,
    trainer_position,
)
from geofm.datamodules.skipped import SkippedFiles, innermost
from geofm.datamodules.stalled import Watched, WatchedLoader, ignore_sigusr1
from geofm.datasets import files_of
from geofm.models.checkpoints import INPUT
from geofm.transforms import Normalize

#: Start method of worker processes.
StartMethod = Literal['fork', 'spawn', 'forkserver']

#: Default of the maximum time in seconds for workers to load a batch.
TIMEOUT = 600.0


class ResumableDataModule(WatchedUnits, PlacesStay, NormalizingDataModule):
    """Data module with reproducible data loaders that can be resumed within an epoch.

    The order of training samples depends on the seed and the epoch. The random numbers that are
    used to read a sample depend on the seed, the epoch and the sample. Neither depends on the
    number of workers. Each rank trains on different samples. A run that is resumed within an epoch
    continues with the next batch. In validation, testing and prediction, samples are read in order,
    with the same random numbers each time.

    Attributes:
        images_as_integers: Whether images of training batches are transferred to the device as
            integers if this is exact, see :class:`geofm.datamodules.narrow.Narrowing`. The task
            gets the same batches. None means True, unless the device is the CPU.
        train_loader: The training data loader in use.
    """

    images_as_integers: bool | None = None
    seed: int
    start_method: StartMethod | None = None
    timeout: float = TIMEOUT
    collate_fn: Any = staticmethod(stack_samples)
    train_loader: ResumableLoader | None = None
    _state: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Normalise as the weights in use were trained, and add callbacks to the trainer.

        Lightning calls the hooks of data modules neither at the end of an epoch nor before a batch.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        self.take_up_statistics()
        if self.trainer is None:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for kind in (SkippedFiles, RecountBatches):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())

    def state_dict(self) -> dict[str, Any]:
        """Return the position in training and the statistics in use, for a checkpoint.

        Returns:
            State of the training loader, and statistics.
        """
        loader = {} if self.train_loader is None else self.train_loader.state_dict()
        return {**loader, **super().state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint.

        Args:
            state_dict: State returned by :meth:`state_dict`.
        """
        super().load_state_dict(state_dict)
        state_dict = {key: value for key, value in state_dict.items() if key != INPUT}
        if not state_dict:
            return
        # Usually the loader is made later, but some strategies load checkpoints after that.
        if self.train_loader is not None:
            self.train_loader.load_state_dict(state_dict)
        else:
            self._state = state_dict

    def files(self, batch: Mapping[str, Any]) -> list[str]:
        """Return the files of a batch of the running loop.

        Args:
            batch: A batch of a loader of this data module, on any device.

        Returns:
            Unique paths; an empty list if the data set does not know its files, or before
            :meth:`setup`.
        """
        dataset: Any = self._dataset_in_use()
        # If samples have several dates, 'pairs' contains those that were drawn.
        key = 'pairs' if 'pairs' in batch else 'index'
        if dataset is None or key not in batch:
            return []
        if key == 'pairs':
            dataset = innermost(dataset)
        numbers = batch[key].flatten().tolist()
        return list(dict.fromkeys(str(path) for n in numbers for path in files_of(dataset, n)))

    def _dataset_in_use(self) -> Dataset[Any] | None:
        """Return the data set of the running loop; if there is none, that of training."""
        trainer = self.trainer
        if trainer and (trainer.validating or trainer.sanity_checking):
            return self.val_dataset
        if trainer and trainer.testing:
            return self.test_dataset
        return self.predict_dataset if trainer and trainer.predicting else self.train_dataset

    def train_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of shuffled training samples.

        The last batch is dropped if it is incomplete, unless it is the only one.

        Returns:
            The data loader.
        """
        return self._training_loader(self._valid_attribute('train_dataset'), self.batch_size)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Make the data loader of validation samples.

        Returns:
            The data loader; an empty list if there is no validation split.
        """
        if self.val_dataset is None:
            return []
        return self._ordered_loader(self.val_dataset, self.batch_size)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of test samples.

        Returns:
            The data loader.
        """
        return self._ordered_loader(self._valid_attribute('test_dataset'), self.batch_size)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Make the data loader of all samples.

        Returns:
            The data loader.
        """
        return self._ordered_loader(self._valid_attribute('predict_dataset'), self.batch_size)

    def _training_loader(self, dataset: Dataset[Sample], batch_size: int) -> DataLoader[Sample]:
        """Make a loader that shuffles samples, distributes them to ranks, and can be resumed.

        The last batch is dropped if it is incomplete, unless it is the only one.
        """
        trainer = self.trainer
        samples = Watched(dataset, self.num_workers)
        sampler = ResumableSampler(
            samples,
            self.seed,
            num_replicas=trainer.world_size if trainer else None,
            rank=trainer.global_rank if trainer else None,
        )
        loader = ResumableLoader(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= batch_size,
            **{**self._loading(), 'collate_fn': self._training_collate()},
        )
        if trainer:
            loader.position = lambda: trainer_position(trainer)
        if self._state is not None:
            loader.load_state_dict(self._state)
            self._state = None
        self.train_loader = loader
        return loader

    def _training_collate(self) -> Any:
        """Return the collate function of training batches.

        Only with a trainer are integers converted back to float32, in *on_after_batch_transfer*.
        """
        wanted = self.images_as_integers
        if wanted is None and self.trainer is not None:
            wanted = self.trainer.strategy.root_device.type != 'cpu'
        if self.trainer is None or not wanted or not isinstance(self.aug, Normalize):
            return self.collate_fn
        return Narrowing(self.collate_fn, self.aug.bands)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert images that were transferred as integers to float32, and normalise.

        Args:
            batch: A batch.
            dataloader_idx: Index of its data loader.

        Returns:
            The batch.
        """
        if isinstance(batch, dict) and isinstance(batch.get('image'), list):
            batch['image'] = widen(batch['image'], self.aug.bands)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def _ordered_loader(self, dataset: Dataset[Sample], batch_size: int) -> DataLoader[Sample]:
        """Make a loader of samples in order, to which Lightning can add a distributed sampler."""
        samples = Watched(dataset, self.num_workers)
        return WatchedLoader(samples, batch_size=batch_size, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """Return the arguments shared by all loaders."""
        if self.start_method == 'forkserver':
            # So that the modules are imported once for all workers.
            multiprocessing.set_forkserver_preload(['geofm.datasets'])
        return {
            'num_workers': self.num_workers,
            'collate_fn': self.collate_fn,
            'pin_memory': torch.cuda.is_available(),
            'persistent_workers': self.num_workers > 0,
            'timeout': self.timeout if self.num_workers else 0,
            'worker_init_fn': ignore_sigusr1,
            'multiprocessing_context': self.start_method if self.num_workers else None,
        }

    def teardown(self, stage: str) -> None:
        """Drop the training loader, so that another run starts at the beginning.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.
        """
        if stage == 'fit':
            self.train_loader = None
