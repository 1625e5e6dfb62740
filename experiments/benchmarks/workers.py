"""Measure the additional memory of four worker processes started by fork and by spawn.

    python experiments/benchmarks/workers.py ROOT

The proportional set size (PSS) divides shared memory between the processes, so that its sum is the
memory that they take together. Spawned workers import everything again; the memory of importing
PyTorch alone and of importing the datasets is measured too. Imports in this file are inside
functions, because spawned workers import it too.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

WORKERS = 4
ITEMS = 400


def memory(entry: str = 'Pss', process: int | str = 'self') -> float:
    """Return an entry of the memory statistics of a process in MiB."""
    for line in Path(f'/proc/{process}/smaps_rollup').read_text().splitlines():
        if line.startswith(f'{entry}:'):
            return int(line.split()[1]) / 1024
    raise ValueError(entry)


class Idle(Dataset[int]):
    """Data set that returns the process id and does nothing else."""

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> int:
        """Return the process id."""
        time.sleep(0.005)
        return os.getpid()


class Importing(Idle):
    """Data set that imports what reading pairs needs."""

    def __getitem__(self, index: int) -> int:
        """Return the process id."""
        import geofm.datasets  # noqa: F401

        return super().__getitem__(index)


class Reading(Idle):
    """Data set that reads pairs whose files exist."""

    def __init__(self, pairs: Any, real: list[int]) -> None:
        self.pairs, self.real = pairs, real

    def __getitem__(self, index: int) -> int:
        """Return the process id."""
        self.pairs[self.real[index % len(self.real)]]
        return os.getpid()


def added(dataset: Dataset[int], method: str) -> float:
    """Return the MiB that each worker adds to the memory of all processes."""
    before = memory()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context=method,
    )
    processes = set(loader)
    assert len(processes) == WORKERS
    # All workers stay alive: they added the memory of all processes now, minus that before.
    return (memory() + sum(memory(process=p) for p in processes) - before) / WORKERS


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('root', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bare = {'spawn_bare_torch_mib': added(Idle(), 'spawn')}

    import numpy as np

    from geofm.datasets import SEN12MSCRTS

    pairs = SEN12MSCRTS(args.root, 'all')
    records = pairs.pairs.records
    real = np.flatnonzero(records['time_step'] == 0)[:150].tolist()
    reading = Reading(pairs, [i for i in real if all(p.is_file() for p in pairs.files_of(i))])
    found = {
        'fork_mib': added(reading, 'fork'),
        **bare,
        'spawn_imports_mib': added(Importing(), 'spawn'),
        'spawn_mib': added(reading, 'spawn'),
    }
    found['spawn_less_imports_mib'] = found['spawn_mib'] - found['spawn_imports_mib']
    print(json.dumps(found))


if __name__ == '__main__':
    main()
