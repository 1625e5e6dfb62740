"""A loader whose workers stop answering: the run ends and names what they were reading."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import SupportsIndex

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchgeo.datasets.utils import Sample

from geofm.datasets.files import files_of
from geofm.datasets.seeded import Seeded

#: Files that a message names.
_NAMED = 3


class Watched(Seeded):
    """Samples, and a note in shared memory of which one each worker process reads."""

    def __init__(self, dataset: Dataset[Sample], num_workers: int) -> None:
        """Initialize a new Watched instance.

        Args:
            dataset: The data set.
            num_workers: Number of worker processes.
        """
        super().__init__(dataset)
        # Process and sample; -1: none.
        self._reading = torch.full((num_workers, 2), -1).share_memory_()

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Its number.

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
        """Kill the workers that are reading: a file system that hangs would keep them for ever.

        Returns:
            What they read: files, or numbers of samples if the data set does not tell.
        """
        stalled = [note for note in self._reading.tolist() if note[1] >= 0]
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises an error of its own when a worker ends.
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
    """A data loader whose timeout says which files its workers were reading."""

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Go through the data set.

        Yields:
            Batches.

        Raises:
            TimeoutError: If the workers do not deliver a batch in time.
        """
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if 'DataLoader timed out' not in str(error) or not isinstance(self.dataset, Watched):
                raise
            names = self.dataset.kill_readers()
            more = f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''
            raise TimeoutError(
                f'no batch within {self.timeout:g} s. Being read: '
                f'{", ".join(names[:_NAMED]) or "nothing"}{more}. Does the file system answer? '
                "The data module's `timeout` sets the time; 0 waits for ever"
            ) from error


def ignore_sigusr1(worker: int) -> None:
    """Leave SIGUSR1, which asks a run to end, to the process that trains.

    SLURM sends it to all processes of a job.

    Args:
        worker: Number of the worker process.
    """
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
