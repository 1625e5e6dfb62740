"""Measure the catalogue: how fast files are scanned, and what 930,000 of them cost.

The scan runs over a generated tree of files as in the data set, in the page cache.
For the scale, a catalogue with a row for each file of SEN12MS-CR-TS is generated, of which the
files that are read exist.

    python experiments/benchmarks/catalogue.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from read_pair import write_tree
from torch.utils.data import DataLoader

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue import beside, update_catalogue
from geofm.datasets.scan import PairKey, SceneName

ROWS = 930_000
TIME_STEPS = 30
REAL = 500


def scan(root: Path, rounds: int) -> dict[str, float]:
    """Files a second of a scan, and of one that finds nothing changed."""
    first, again = [], []
    files = len(update_catalogue(root).table)
    for _ in range(rounds):
        beside(root).unlink()
        for times in (first, again):
            start = time.perf_counter()
            update_catalogue(root)
            times.append(time.perf_counter() - start)
    return {
        'files': files,
        'scan_files_per_s': files / statistics.median(first),
        'rescan_files_per_s': files / statistics.median(again),
        'rescan_ratio': statistics.median(first) / statistics.median(again),
    }


def enlarge(root: Path, rows: int, jitter: float = 0.0) -> None:
    """Give the catalogue rows for files that do not exist, in the likeness of those that do.

    Args:
        root: Folder with a catalogue.
        rows: Number of rows that it is to have.
        jitter: Corners of files differ by that at most, as they do by rounding; in degrees.
    """
    catalogue = update_catalogue(root)
    table = catalogue.table
    copies = -(-rows // len(table)) - 1
    parts = [table]
    for copy in range(1, copies + 1):
        # A patch at all its time steps, then other patches.
        patch, step = divmod(copy, TIME_STEPS)
        part = table.assign(
            time_step=np.int32(step),
            patch=table['patch'] + np.int32(patch * REAL),
            c=table['c'] + patch,
        )
        names = (
            SceneName(row.sensor, PairKey(row.season, row.roi, row.patch, step), row.date.date())
            for row in part.itertuples()
        )
        parts.append(part.assign(path=[f'{name.folder}/{name.filename}' for name in names]))
    whole = pd.concat(parts, ignore_index=True).iloc[:rows].astype(table.dtypes.to_dict())
    rng = np.random.default_rng(0)
    for axis in ('c', 'f'):
        made = np.arange(len(whole)) >= len(table)
        whole[axis] += rng.uniform(-jitter, jitter, len(whole)) * made
    replace(catalogue, table=whole.sort_values('path', ignore_index=True)).write()


def _memory(process: int | str, file: str, entry: str) -> float:
    """An entry of a file of /proc/PID in MiB."""
    for line in Path(f'/proc/{process}/{file}').read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) / 1024
    raise ValueError(entry)


def _pss(process: int | str) -> float:
    """Proportional set size of a process in MiB: what is shared counts in parts."""
    return _memory(process, 'smaps_rollup', 'Pss:')


class _Watch(torch.utils.data.Dataset[int]):
    """Reads real pairs and says which process did."""

    def __init__(self, pairs: SEN12MSCRTS, real: list[int]) -> None:
        self.pairs, self.real = pairs, real

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> int:
        """Process that read a sample."""
        self.pairs[self.real[index % len(self.real)]]
        return os.getpid()


def open_and_read(root: Path, workers: int) -> dict[str, float]:
    """Cost of opening, of a sample, and of workers, in a process of its own."""
    start = time.perf_counter()
    ds = SEN12MSCRTS(root, 'all')
    seconds = time.perf_counter() - start
    peak = _memory('self', 'status', 'VmHWM:')
    real = np.flatnonzero((ds.index['time_step'] == 0) & (ds.index['patch'] < REAL)).tolist()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for i in real[:150]:
            ds[i]
        times.append((time.perf_counter() - start) / 150)
    found = {
        'pairs': len(ds),
        'open_s': seconds,
        'peak_mib': peak,
        'sample_ms': 1e3 * statistics.median(times),
    }
    left, bottom, right, top = ds.index.geometry.iloc[real[7]].bounds
    when = ds.index.index[real[7]]
    ds[left:right, bottom:top, when.left : when.right]
    start = time.perf_counter()
    for _ in range(20):
        ds._find((left, bottom, right, top), when.left, when.right)
    found['look_up_ms'] = (time.perf_counter() - start) / 20 * 1e3
    if workers:
        before = _pss('self')
        watch = _Watch(ds, real)
        loader = DataLoader(watch, batch_size=None, num_workers=workers, persistent_workers=True)
        processes = set(loader)
        # All of them live on: what they added is what all weigh now, less what one did before.
        added = _pss('self') + sum(map(_pss, processes)) - before
        found['added_pss_mib_a_worker'] = added / workers
    return found


def apart(root: Path, workers: int) -> dict[str, float]:
    """Result of :func:`open_and_read` in a new process."""
    command = [sys.executable, __file__, '--open', str(root), '--workers', str(workers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    """Measure, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--workers', type=int, default=4)
    parser.add_argument('--scan-pairs', type=int, default=1500)
    parser.add_argument('--open', type=Path, help='measure one tree only, as JSON')
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.open:
        print(json.dumps(open_and_read(args.open, args.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        small, large, many = (Path(folder) / name for name in ('small', 'large', 'many'))
        write_tree(many, args.scan_pairs)
        found = scan(many, args.rounds)
        for root in (small, large):
            write_tree(root, REAL)
        update_catalogue(small)
        enlarge(large, ROWS)
        # Interleaved; the memory is measured in each.
        runs = [(apart(small, 0), apart(large, args.workers)) for _ in range(args.rounds)]
    for i, name in enumerate(('small', 'large')):
        for key in runs[0][i]:
            found[f'{name}_{key}'] = statistics.median(run[i][key] for run in runs)
    found['sample_ratio'] = found['large_sample_ms'] / found['small_sample_ms']
    lines = [
        f'# Catalogue: a scan, and {ROWS:,} rows',
        '',
        f'Median of {args.rounds} rounds; {2 * REAL} files in the small tree; '
        f'{args.workers} workers, started by fork.',
        '',
        '| | |',
        '|---|---:|',
        *(f'| {name.replace("_", " ")} | {value:,.2f} |' for name, value in found.items()),
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'catalogue.md').write_text('\n'.join(lines) + '\n')
    (args.output / 'catalogue.json').write_text(json.dumps(found, indent=1) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
