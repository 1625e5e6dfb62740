"""Measure the catalogue: how fast files are scanned, and what 930,000 of them cost.

The scan runs over a generated tree of files as in the data set, in the page cache.
For the scale, a catalogue with a row for each file of SEN12MS-CR-TS is generated, of which the
files that are read exist.

    OMP_NUM_THREADS=1 python experiments/benchmarks/catalogue.py
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import torch
from read_pair import write_tree

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue.catalogue import beside, update_catalogue
from geofm.datasets.footprints import outlines
from geofm.sen12ms import PairKey, SceneName

ROWS = 930_000
TIME_STEPS = 30
REAL = 500


#: Pairs read per round.
SAMPLES = 150


def scan(root: Path) -> dict[str, float]:
    """Return files per second of a scan, and of a scan that finds no changes."""
    beside(root).unlink(missing_ok=True)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        files = len(update_catalogue(root).table)
        seconds.append(time.perf_counter() - start)
    first, again = seconds
    return {
        'scan_files_per_s': files / first,
        'rescan_files_per_s': files / again,
        'rescan_ratio': first / again,
    }


def enlarge(root: Path, rows: int, jitter: float = 0.0) -> None:
    """Add rows for files that do not exist to the catalogue, similar to those that do.

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
            SceneName(sensor, PairKey(season, roi, patch, step), date.date())
            for sensor, season, roi, patch, date in zip(
                part['sensor'],
                part['season'],
                part['roi'],
                part['patch'],
                part['date'],
                strict=True,
            )
        )
        parts.append(part.assign(path=[f'{name.folder}/{name.filename}' for name in names]))
    whole = pd.concat(parts, ignore_index=True).iloc[:rows].astype(table.dtypes.to_dict())
    rng = np.random.default_rng(0)
    for axis in ('c', 'f'):
        made = np.arange(len(whole)) >= len(table)
        whole[axis] += rng.uniform(-jitter, jitter, len(whole)) * made
    replace(catalogue, table=whole.sort_values('path', ignore_index=True)).write()


def open_once(root: Path) -> dict[str, float]:
    """Return the cost of opening, including imports, in this process."""
    imports = peak()
    start = time.perf_counter()
    pairs = SEN12MSCRTS(root, 'all')
    seconds = time.perf_counter() - start
    return {'pairs': len(pairs), 'open_s': seconds, 'imports_mib': imports, 'peak_mib': peak()}


def peak() -> float:
    """Return the peak memory of this process in MiB."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmHWM:'):
            return int(line.split()[1]) / 1024
    raise ValueError('VmHWM')


def sample(small: Path, large: Path, rounds: int) -> dict[str, float]:
    """Return the cost of a sample by number and by place and time, for both trees in turns."""
    trees = {name: SEN12MSCRTS(root, 'all') for name, root in (('small', small), ('large', large))}
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, pairs in trees.items():
            records = pairs.pairs.records
            real = np.flatnonzero((records['time_step'] == 0) & (records['patch'] < REAL))
            real = real[:SAMPLES]
            shapes = shapely.bounds(outlines(pairs.pairs.corners(real, pairs.crs)))
            when = pairs.pairs.spans(real)
            boxes = [
                (slice(left, right), slice(low, high), slice(start, stop))
                for (left, low, right, high), start, stop in zip(
                    shapes.tolist(), *map(pd.DatetimeIndex, when), strict=True
                )
            ]
            # The search is made once.
            pairs[boxes[0]]
            for key, wanted in (('number', real.tolist()), ('place', boxes)):
                start = time.perf_counter()
                for index in wanted:
                    pairs[index]
                seconds = time.perf_counter() - start
                times.setdefault(f'{name}_{key}_ms', []).append(1e3 * seconds / SAMPLES)
    found = {key: statistics.median(values) for key, values in times.items()}
    for key in ('number', 'place'):
        ratios = zip(times[f'large_{key}_ms'], times[f'small_{key}_ms'], strict=True)
        found[f'{key}_ratio'] = statistics.median(large / small for large, small in ratios)
    return found


def apart(*command: str | Path) -> dict[str, float]:
    """Return the output of a script run in a separate process."""
    here = Path(__file__).parent
    line = [sys.executable, '-W', 'ignore', here / command[0], *command[1:]]
    result = subprocess.run(list(map(str, line)), check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each value over rounds."""
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def report(found: dict[str, float], rounds: int, files: int) -> list[str]:
    """Return a table of goals and measurements."""
    rows = [
        ('files scanned per second, 2 cores, warm', '>= 2,000', found['scan_files_per_s'], 0),
        ('a second scan with nothing changed, times faster', '>= 10', found['rescan_ratio'], 1),
        (f'{ROWS:,} rows: seconds to open', '< 3', found['open_s'], 2),
        ('peak memory of opening, imports included, MiB', '< 1,024', found['peak_mib'], 0),
        ('imports alone, MiB', '', found['imports_mib'], 0),
        ('a sample by number, relative to 1,000 rows', '<= 1.2', found['number_ratio'], 2),
        ('a sample by place and time, relative to 1,000 rows', '<= 1.2', found['place_ratio'], 2),
        ('a worker started by fork adds, MiB', '< 100', found['fork_mib'], 0),
        ('a worker started by spawn adds, MiB', '< 100', found['spawn_mib'], 0),
        ('worker started by spawn: PyTorch alone, MiB', '', found['spawn_bare_torch_mib'], 0),
        ('worker started by spawn: all imports, MiB', '', found['spawn_imports_mib'], 0),
        ('worker started by spawn: the pairs, MiB', '', found['spawn_less_imports_mib'], 0),
    ]
    return [
        f'# Catalogue: a scan, and {ROWS:,} rows',
        '',
        f'Median of {rounds} interleaved rounds. The scan is of {files:,} files. The corners '
        f'of the {ROWS:,} generated rows have random offsets of up to 1e-10 degrees, like the '
        'rounding differences of real files. Memory of workers is proportional set size (PSS), '
        'for each of four.',
        '',
        '| | goal | found |',
        '|---|---:|---:|',
        *(f'| {name} | {asked} | {value:,.{digits}f} |' for name, asked, value, digits in rows),
    ]


def main() -> None:
    """Measure, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--scan-pairs', type=int, default=1500)
    parser.add_argument('--open', type=Path, help='open one tree only, and print JSON')
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.open:
        print(json.dumps(open_once(args.open)))
        return
    with tempfile.TemporaryDirectory() as folder:
        small, large, many = (Path(folder) / name for name in ('small', 'large', 'many'))
        write_tree(small, REAL)
        shutil.copytree(small, large, copy_function=os.link)
        write_tree(many, args.scan_pairs)
        update_catalogue(small)
        enlarge(large, ROWS, jitter=1e-10)
        # What is done only once in a process is no matter of speed.
        scan(many)
        turns: dict[str, list[dict[str, float]]] = {'scan': [], 'open': [], 'workers': []}
        for _ in range(args.rounds):
            turns['scan'].append(scan(many))
            turns['open'].append(apart('catalogue.py', '--open', large))
            turns['workers'].append(apart('workers.py', large))
        found = {key: value for rounds in turns.values() for key, value in medians(rounds).items()}
        found |= sample(small, large, max(args.rounds, 5))
    lines = report(found, args.rounds, 2 * args.scan_pairs)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'catalogue.md').write_text('\n'.join(lines) + '\n')
    (args.output / 'catalogue.json').write_text(
        json.dumps({'medians': found, 'rounds': turns}, indent=1) + '\n'
    )
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
