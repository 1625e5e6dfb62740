"""Which samples an epoch sees, in which order and on which process, from any step on."""

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
from geofm.datasets.seeded import Visit

#: Positions of the order that are computed at a time.
_AT_ONCE = 2**14


class ResumableSampler(DistributedSampler[int]):
    """Samples of one process, in an order that seed and epoch alone decide.

    The processes deal out one permutation of the whole data set among them, so none sees what
    another does. If the number of samples is not a multiple of theirs, the last few of the
    permutation are left off, others in each epoch, rather than shown twice. The order knows nothing
    of batches or processes: an epoch can be resumed from any sample, by any number of
    processes.

    Lightning leaves a sampler of this class in place, and tells it the epoch.
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
            num_replicas: Number of processes; by default that of ``torch.distributed``, or 1.
            rank: Number of this process; by default that of ``torch.distributed``, or 0.

        Raises:
            ValueError: If there are fewer samples than processes, or *rank* is not below
                *num_replicas*.
        """
        together = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if together else 1
        if rank is None:
            rank = dist.get_rank() if together else 0
        if len(dataset) < num_replicas:
            raise ValueError(f'{len(dataset)} samples cannot be shared by {num_replicas} processes')
        # Typed as a Dataset by PyTorch, which only takes its length.
        any_dataset: Any = dataset
        super().__init__(any_dataset, num_replicas, rank, shuffle, seed, drop_last=True)
        self.n_samples = len(dataset)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Go through the rest of the epoch.

        Yields:
            Numbers of samples, each a :class:`Visit`.
        """
        epoch, seed = self.epoch, self.seed
        order = Shuffle(self.n_samples, seed, epoch) if self.shuffle else None
        # As many for each process, wherever it starts: they wait for each other.
        mine = range(self.start + self.rank, self.n_samples, self.num_replicas)[: self.left()]
        for first in range(0, len(mine), _AT_ONCE):
            part = mine[first : first + _AT_ONCE]
            numbers = np.arange(part.start, part.stop, part.step)
            if order is not None:
                numbers = order.at(numbers)
            yield from (Visit(index, epoch, seed) for index in numbers.tolist())

    def left(self) -> int:
        """Number of samples of the epoch that each process has still to see."""
        return (self.n_samples - self.start) // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch: to its start, unless it is the one that is under way.

        Args:
            epoch: The epoch.
        """
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands.

        Returns:
            Its seed, the epoch, and the number of samples of the epoch that all processes
            together leave out.
        """
        return {'seed': self.seed, 'epoch': self.epoch, 'start': self.start}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a saved state.

        Args:
            state_dict: As of :meth:`state_dict`, of a run on any number of processes.
        """
        self.seed = state_dict['seed']
        self.epoch = state_dict['epoch']
        self.start = state_dict['start']


class ResumableLoader(WatchedLoader):
    """A data loader whose state a checkpoint holds: it resumes with the next batch of the epoch.

    Its sampler must be a :class:`ResumableSampler`; with another one (Lightning's
    ``overfit_batches`` brings its own) nothing is kept.

    Attributes:
        position: Gives the epoch and the number of its batches that are done. By default, all
            batches handed out are. A trainer that is interrupted in the middle of a step knows
            better: see :func:`trainer_position`.
    """

    position: Callable[[], tuple[int, int]] | None = None
    _handed_out = 0

    @property
    def _batch_samples(self) -> int:
        """Samples in a batch, over all processes."""
        assert isinstance(self.sampler, ResumableSampler)
        return (self.batch_size or 1) * self.sampler.num_replicas

    @property
    def batches_before(self) -> int:
        """Batches of the epoch that are done on resuming, counted in the present batch size.

        Those that are left make it as many as an epoch has.
        """
        if not isinstance(self.sampler, ResumableSampler) or not self.sampler.start:
            return 0
        left, size = self.sampler.left(), self.batch_size or 1
        return len(self) - (left // size if self.drop_last else -(-left // size))

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Go through the rest of the epoch.

        Yields:
            Batches.
        """
        self._handed_out = self.batches_before
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, see :meth:`ResumableSampler.state_dict`.

        Returns:
            The state of the sampler after the batches that are done.
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
            state_dict: As of :meth:`state_dict`.
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
            batch_idx: Its number.
        """
        progress = trainer.fit_loop.epoch_progress
        current: Any = progress.current
        if current.started == current.processed:
            progress.increment_ready()
            progress.increment_started()


def run_seed(seed: int | None = None) -> int:
    """Seed of what is drawn for the samples of a run, the same on all processes.

    Args:
        seed: A seed.

    Returns:
        That seed, or the one given to Lightning's ``seed_everything``, or 0.
    """
    return int(os.environ.get('PL_GLOBAL_SEED', 0)) if seed is None else seed


def trainer_position(trainer: Trainer) -> tuple[int, int]:
    """Where a trainer would go on, were it saved now.

    In the middle of a step, as when SLURM asks a job to make way, Lightning does the step again.

    Args:
        trainer: The trainer, fitting.

    Returns:
        The epoch and the number of its batches that are done.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress.current
    if epoch.started == epoch.processed:
        return epoch.processed, 0
    return epoch.processed, batches.processed
