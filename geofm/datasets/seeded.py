"""Random numbers that depend on seed, epoch and sample alone."""

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.sensors import added_sensors, register_sensor


class Visit(int):
    """Number of a sample that knows the epoch it is drawn in.

    To a dataset it is a plain int; :class:`Seeded` asks it for more. So workers, which have copies
    of the dataset of their own, learn the epoch with each sample, however long they live.

    Attributes:
        epoch: The epoch.
        seed: Seed of the run.
    """

    epoch: int
    seed: int

    def __new__(cls, index: int, epoch: int = 0, seed: int = 0) -> 'Visit':
        """Make a visit.

        Args:
            index: Number of the sample.
            epoch: The epoch.
            seed: Seed of the run.

        Returns:
            The visit.
        """
        visit = super().__new__(cls, index)
        visit.epoch = epoch
        visit.seed = seed
        return visit

    def __reduce__(self) -> tuple[Any, ...]:
        return Visit, (int(self), self.epoch, self.seed)


class Seeded(Dataset[Sample]):
    """A dataset whose random numbers depend on seed, epoch and sample alone.

    What the dataset and its transforms draw from Python's, NumPy's and PyTorch's global
    generators is then the same whatever the number of workers, how they are started, what was
    drawn before, and whether the run was resumed. The generators are left as they were.
    """

    def __init__(self, dataset: Dataset[Sample]) -> None:
        """Initialize a new Seeded instance.

        Args:
            dataset: The dataset.
        """
        self.dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is spawned knows the built-in sensors only.
        return {**self.__dict__, 'sensors': added_sensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for sensor in state.pop('sensors'):
            register_sensor(sensor)
        self.__dict__.update(state)

    def __len__(self) -> int:
        """Number of samples."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: A :class:`Visit`; a plain number is one of epoch 0 and seed 0.

        Returns:
            The sample.
        """
        number = index.__index__()
        visit = index if isinstance(index, Visit) else Visit(number)
        with _seeded(visit.seed, visit.epoch, number):
            return self.dataset[visit]


@contextmanager
def _seeded(*keys: int) -> Iterator[None]:
    """Seed the global generators of the CPU, and put them back afterwards."""
    # Transforms of TorchGeo and of others draw from NumPy's legacy generator.
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # SeedSequence mixes the keys, so that neighbours share nothing. It takes no negative ones.
    words = np.random.SeedSequence([key % 2**64 for key in keys]).generate_state(4, np.uint32)
    first, second, high, low = (int(word) for word in words)
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002
    # Not torch.manual_seed, which would also wake the accelerator in each worker.
    torch.default_generator.manual_seed(high << 32 | low)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_rng_state(state[2])
