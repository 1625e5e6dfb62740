"""Measure time and memory of opening a large table of rasters, and the cost of a look-up.

The tables are generated: two sensors, 20 dates of each place, one file each. What is measured, each
in a process of its own:

* open: ``RasterTable.read`` and ``Observations.of``, and with --dataset ``RasterArchive``;
* look-up: from the number of a random observation to the path and the grid of its file; with
  --dataset also from the number of a random sample to its files.

    python experiments/benchmarks/table.py --rows 10000 10000000
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

#: Dates per place, and rows that are generated at a time.
DATES, AT_ONCE = 20, 1_000_000

#: Observations that are looked up.
LOOK_UPS = 20_000


def write_table(path: Path, rows: int) -> None:
    """Generate a table sorted by place, sensor and date, or with places in random order."""
    writer = None
    for start in range(0, rows, AT_ONCE):
        number = np.arange(start, min(start + AT_ONCE, rows))
        place, rest = np.divmod(number, 2 * DATES)
        sensor, date = np.divmod(rest, DATES)
        # Places on a grid of 2.56 km in UTM zone 31, 1,000 a row.
        row, col = np.divmod(place, 1000)
        day = np.datetime64('2018-01-01', 'us') + (date * 12 * 86_400_000_000).astype('m8[us]')
        x, y = 200_000.0 + col * 2560, 8_000_000.0 - row * 2560
        west, north = -3.0 + col * 0.03, 72.0 - row * 0.03
        transform = np.stack(
            [np.full(len(x), v) if np.isscalar(v) else v for v in (10.0, 0.0, x, 0.0, -10.0, y)], 1
        )
        paths = [
            f'zone_31/place_{p:06}/{("s1", "s2")[s]}/{("s1", "s2")[s]}_place_{p:06}_{d}.tif'
            for p, s, d in zip(
                place.tolist(), sensor.tolist(), day.astype('M8[D]').tolist(), strict=True
            )
        ]
        names = pa.array([f'place_{p:06}' for p in range(place[0], place[-1] + 1)])
        columns = {
            'path': pa.array(paths),
            'sensor': pa.DictionaryArray.from_arrays(
                pa.array(sensor.astype(np.int32)), ['s1', 's2']
            ),
            'datetime': pa.array(day, pa.timestamp('us', 'UTC')),
            'place': pa.DictionaryArray.from_arrays(
                pa.array((place - place[0]).astype(np.int32)), names
            ),
            'crs': pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(len(x), np.int32)), ['EPSG:32631']
            ),
            'transform': pa.FixedSizeListArray.from_arrays(pa.array(transform.ravel()), 6),
            'height': pa.array(np.full(len(x), 256, np.int32)),
            'width': pa.array(np.full(len(x), 256, np.int32)),
            'west': pa.array(west),
            'south': pa.array(north - 0.023),
            'east': pa.array(west + 0.07),
            'north': pa.array(north),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression='zstd')
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure_table(path: Path) -> dict[str, Any]:
    """Open a table and look up observations in this process."""
    from geofm.datasets.table import Observations, RasterTable

    before = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    table = RasterTable.read(path)
    read = time.perf_counter() - start
    observations = Observations.of(table)
    grouped = time.perf_counter() - start
    found: dict[str, Any] = {
        'rows': len(table),
        'read_s': round(read, 2),
        'observations_s': round(grouped - read, 2),
        'cpu_s': round(time.process_time() - cpu, 2),
        'peak_gib': _peak(),
        'imports_gib': before,
    }
    numbers = np.random.default_rng(0).integers(0, len(observations), LOOK_UPS).tolist()

    def look_up(number: int) -> None:
        row = int(observations.rows(number)[0])
        table.path(row)
        table.grid(row)

    return {**found, 'look_up_us': _time(look_up, numbers)}


def measure_dataset(path: Path) -> dict[str, Any]:
    """Open the data set of a table and look up the files of samples in this process."""
    from geofm.datasets import RasterArchive

    start, cpu = time.perf_counter(), time.process_time()
    data = RasterArchive(path, ['s1', 's2'], split='all')
    found = {
        'samples': len(data),
        'dataset_s': round(time.perf_counter() - start, 2),
        'dataset_cpu_s': round(time.process_time() - cpu, 2),
        'dataset_peak_gib': _peak(),
    }
    numbers = np.random.default_rng(0).integers(0, len(data), LOOK_UPS).tolist()
    return {**found, 'files_of_us': _time(data.files_of, numbers)}


def _peak() -> float:
    """Return the peak memory of this process so far, in GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _time(function: Any, numbers: list[int]) -> float:
    """Return the mean time of a call, median of five runs, in microseconds."""
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for number in numbers:
            function(number)
        runs.append((time.perf_counter() - start) / len(numbers) * 1e6)
    return round(sorted(runs)[2], 1)


def main() -> None:
    """Generate and measure tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, nargs='+', default=[10_000, 10_000_000])
    parser.add_argument('--dataset', action='store_true')
    parser.add_argument('--output', type=Path)
    parser.add_argument('--measure', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure = measure_dataset if args.dataset else measure_table
        print(json.dumps(measure(args.measure)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            path = Path(folder) / f'{rows}.parquet'
            write_table(path, rows)
            found = {'file_mib': round(path.stat().st_size / 2**20)}
            for options in ([], ['--dataset']) if args.dataset else ([],):
                command = [sys.executable, __file__, '--measure', str(path), *options]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found |= json.loads(done.stdout)
            results.append(found)
            print(results[-1], flush=True)
            path.unlink()
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
