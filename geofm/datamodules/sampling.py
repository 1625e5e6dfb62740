"""Samplers and loaders that can be resumed at any sample of an epoch, on any number of ranks."""

import math
import os
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DistributedSampler
from torchgeo.datasets.utils import Sample

from geofm.datamodules.stalled import WatchedLoader
from geofm.datasets import Visit
from geofm.printing import counted

#: Maximum number of samples of data sets that are shuffled with a list of samples.
MOST_LISTED = 2**20

#: Rounds of the Feistel network. Four suffice for a pseudo-random permutation (Luby and Rackoff,
#: 1988). More compensate for simple round functions.
_ROUNDS = 8

type Numbers = npt.NDArray[np.int64]


class Shuffle:
    """Pseudo-random permutation of 0 to n - 1 that only depends on seed and epoch.

    Up to :data:`MOST_LISTED` samples, it is NumPy's permutation. For more, it is a Feistel network
    with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each
    entry is computed independently, so that an epoch of a billion samples takes no memory and can
    start at any sample without delay.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        """Initialize a new Shuffle instance.

        Args:
            n: Number of samples.
            seed: Seed of the run.
            epoch: The epoch.
        """
        self.n = n
        rng = np.random.default_rng([seed, epoch])
        self._listed = rng.permutation(n) if n <= MOST_LISTED else None
        self._keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
        # Numbers are written as two digits in this base, so that base² is n or slightly more.
        self._base = np.uint64(math.isqrt(max(n - 1, 0)) + 1)

    def at(self, positions: Numbers) -> Numbers:
        """Return the indices of the samples at the given positions of the epoch.

        Args:
            positions: Positions, 0 to n - 1, int64 (K,).

        Returns:
            Indices of the samples, int64 (K,).
        """
        if self._listed is not None:
            return self._listed[positions]
        found = self._permuted(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.n)).size:
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Permute 0 to base² - 1."""
        left, right = np.divmod(numbers, self._base)
        for key in self._keys:
            left, right = right, (left + _mixed(right ^ key)) % self._base
        return left * self._base + right


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of words with SplitMix64's finaliser, halved so that sums do not overflow."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (words ^ (words >> np.uint64(31))) >> np.uint64(1)


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
            raise ValueError(f'{counted(len(dataset), "sample")} for {num_replicas} ranks: too few')
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
