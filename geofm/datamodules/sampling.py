"""Samplers and loaders that can be resumed at any sample of an epoch, on any number of ranks."""

import math
import os
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DistributedSampler
from torchgeo.datasets.utils import Sample

from geofm.datamodules.order import Shuffle
from geofm.datamodules.stalled import WatchedLoader
from geofm.datasets import Visit

#: Number of positions of the order that are computed at once.
_AT_ONCE = 2**14


class ResumableSampler(DistributedSampler[int]):
    """Distributed sampler whose order only depends on the seed and the epoch.

    A permutation of the whole data set is distributed to the ranks, so that they see different
    samples. If the number of samples is not a multiple of the number of ranks, the last samples of
    the permutation are left out, which differ between epochs. The order does not depend on the
    batch size or the number of ranks. Therefore an epoch can be resumed at any sample, on any
    number of ranks.

    Lightning does not replace a sampler of this class, and sets its epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Initialize a new ResumableSampler instance.

        Args:
            dataset: Any map-style dataset.
            seed: Seed of the order.
            shuffle: Whether to shuffle.
            num_replicas: Number of ranks; by default taken from ``torch.distributed``, or 1.
            rank: Rank of this process; by default taken from ``torch.distributed``, or 0.

        Raises:
            ValueError: If there are fewer samples than ranks, or *rank* is not less than
                *num_replicas*.
        """
        together = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if together else 1
        if rank is None:
            rank = dist.get_rank() if together else 0
        if len(dataset) < num_replicas:
            raise ValueError(f'{len(dataset)} samples are too few for {num_replicas} ranks')
        # PyTorch requires a Dataset, but only uses its length.
        any_dataset: Any = dataset
        super().__init__(any_dataset, num_replicas, rank, shuffle, seed, drop_last=True)
        self.n_samples = len(dataset)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rest of the epoch.

        Yields:
            Indices of samples, each a :class:`Visit`.
        """
        epoch, seed = self.epoch, self.seed
        order = Shuffle(self.n_samples, seed, epoch) if self.shuffle else None
        # The same number on each rank, since ranks wait for one another.
        mine = range(self.start + self.rank, self.n_samples, self.num_replicas)[: self.left()]
        for first in range(0, len(mine), _AT_ONCE):
            part = mine[first : first + _AT_ONCE]
            numbers = np.arange(part.start, part.stop, part.step)
            if order is not None:
                numbers = order.at(numbers)
            yield from (Visit(index, epoch, seed) for index in numbers.tolist())

    def left(self) -> int:
        """Return the number of samples left in the epoch, per rank."""
        return (self.n_samples - self.start) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and go to its start unless it is the current epoch.

        Args:
            epoch: The epoch.
        """
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the position of the sampler.

        Returns:
            Seed, epoch, and number of samples of the epoch that are done, over all ranks.
        """
        return {'seed': self.seed, 'epoch': self.epoch, 'start': self.start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a saved state.

        Args:
            state_dict: State returned by :meth:`state_dict`, with any number of ranks.
        """
        self.seed = state_dict['seed']
        self.epoch = state_dict['epoch']
        self.start = state_dict['start']


class ResumableLoader(WatchedLoader):
    """Data loader with a state, which resumes with the next batch of the epoch.

    Its sampler must be a :class:`ResumableSampler`. With another sampler, such as that of
    Lightning's ``overfit_batches``, it has no state.

    Attributes:
        position: Function that returns the epoch and the number of its batches that are done. By
            default, all batches returned so far are considered done. A trainer may be interrupted
            within a step, see :func:`trainer_position`.
    """

    position: Callable[[], tuple[int, int]] | None = None
    _handed_out = 0

    @property
    def _batch_samples(self) -> int:
        """Number of samples in a batch, over all ranks."""
        assert isinstance(self.sampler, ResumableSampler)
        return (self.batch_size or 1) * self.sampler.num_replicas

    @property
    def batches_before(self) -> int:
        """Number of batches of the epoch that were done before resuming.

        It is chosen such that, with the batches that are left at the current batch size, the epoch
        has its usual number of batches.
        """
        if not isinstance(self.sampler, ResumableSampler) or not self.sampler.start:
            return 0
        left, size = self.sampler.left(), self.batch_size or 1
        return len(self) - (left // size if self.drop_last else -(-left // size))

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Iterate over the rest of the epoch.

        Yields:
            Batches.
        """
        self._handed_out = self.batches_before
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position of the loader, see :meth:`ResumableSampler.state_dict`.

        Returns:
            State of the sampler after the batches that are done.
        """
        if not isinstance(self.sampler, ResumableSampler):
            return {}
        if self.position is not None:
            epoch, batches = self.position()
        else:
            epoch, batches = self.sampler.epoch, self._handed_out
            if batches >= len(self):
                epoch, batches = epoch + 1, 0
        first = (self.sampler.start, self.batches_before)
        start, before = first if epoch == self.sampler.epoch else (0, 0)
        start += (batches - before) * self._batch_samples
        return {**self.sampler.state_dict(), 'epoch': epoch, 'start': start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a saved state.

        Args:
            state_dict: State returned by :meth:`state_dict`.
        """
        if state_dict and isinstance(self.sampler, ResumableSampler):
            self.sampler.load_state_dict(state_dict)


class RecountBatches(Callback):
    """Callback that corrects the batch count of an epoch resumed with another batch size.

    Lightning continues with the batch count of the checkpoint, and would end the epoch too early or
    too late. :class:`~geofm.datamodules.resumable.ResumableDataModule` adds this callback.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number of batches that are done.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        loop, loader = trainer.fit_loop, getattr(datamodule, 'train_loader', None)
        epoch: Any = loop.epoch_progress.current
        batches: Any = loop.epoch_loop.batch_progress.current
        if loader is None or not batches.processed or math.isinf(loop.max_batches):
            return
        ended = epoch.started == epoch.processed
        shift = int(loop.max_batches if ended else loader.batches_before) - batches.processed
        for name in ('ready', 'started', 'processed', 'completed'):
            setattr(batches, name, getattr(batches, name) + shift)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark an epoch as started where Lightning does not.

        If a run resumes from a checkpoint of the last batch of an epoch, Lightning does not count
        the next epoch as started. A checkpoint in that epoch would resume at its start.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch.
            batch_idx: Index of the batch.
        """
        progress = trainer.fit_loop.epoch_progress
        current: Any = progress.current
        if current.started == current.processed:
            progress.increment_ready()
            progress.increment_started()


def run_seed(seed: int | None = None) -> int:
    """Return the seed for the data of a run, the same on all ranks.

    Args:
        seed: A seed, or None.

    Returns:
        *seed* if it is given, else that of Lightning's ``seed_everything``, else 0.
    """
    return int(os.environ.get('PL_GLOBAL_SEED', 0)) if seed is None else seed


def trainer_position(trainer: Trainer) -> tuple[int, int]:
    """Return the position at which a trainer would resume if it were saved now.

    If it is saved within a step, for example when SLURM preempts the job, Lightning repeats the
    step.

    Args:
        trainer: The trainer, while fitting.

    Returns:
        The epoch and the number of its batches that are done.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    if epoch.started == epoch.processed:
        return epoch.processed, 0
    return epoch.processed, batches.processed
