"""Data loaders that report which files were being read if workers stall."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import SupportsIndex

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchgeo.datasets.utils import Sample

from geofm.datasets import Seeded, files_of

#: Maximum number of files in a message.
_NAMED = 3


class Watched(Seeded):
    """Data set that records in shared memory which sample each worker process is reading."""

    def __init__(self, dataset: Dataset[Sample], num_workers: int) -> None:
        """Initialize a new Watched instance.

        Args:
            dataset: The data set.
            num_workers: Number of worker processes.
        """
        super().__init__(dataset)
        # Process ID and index of the sample; -1 for none.
        self._reading = torch.full((num_workers, 2), -1).share_memory_()

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample.
        """
        worker = get_worker_info()
        if worker is None:
            return super().__getitem__(index)
        note = self._reading[worker.id]
        note[0], note[1] = os.getpid(), index.__index__()
        try:
            return super().__getitem__(index)
        finally:
            note[1] = -1

    def kill_readers(self) -> list[str]:
        """Kill the workers that are reading, since a stalled file system would block them forever.

        Returns:
            The files being read, or indices of samples if the data set does not know its files.
        """
        stalled = [note for note in self._reading.tolist() if note[1] >= 0]
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise an error when a worker ends.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for process, _ in stalled:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        names: list[str] = []
        for _, number in stalled:
            files = files_of(self.dataset, number)
            names += map(str, files) if files else [f'sample {number}']
        return list(dict.fromkeys(names))


class WatchedLoader(DataLoader[Sample]):
    """Data loader that lists the files being read if it times out."""

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Iterate over the data set.

        Yields:
            Batches.

        Raises:
            TimeoutError: If the workers do not load a batch in time.
        """
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if 'DataLoader timed out' not in str(error) or not isinstance(self.dataset, Watched):
                raise
            names = self.dataset.kill_readers()
            more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
            raise TimeoutError(
                f'no batch within {self.timeout:g} s. Files being read: '
                f'{", ".join(names[:_NAMED]) or "none"}{more}. Check the file system, or set a '
                'larger `timeout` of the data module (0 for no limit)'
            ) from error


def ignore_sigusr1(worker: int) -> None:
    """Ignore SIGUSR1 in a worker process.

    SLURM sends the signal to all processes of a job, but only the training process handles it.

    Args:
        worker: Index of the worker process.
    """
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
