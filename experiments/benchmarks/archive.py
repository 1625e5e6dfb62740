"""Open a table of many rasters as a data set and read random windows from it.

The table has two sensors and ten dates of each place. All rows of a sensor name one of a few real
files, so that reading costs the same whatever the number of rows; the page cache is warm. Each
size is opened in a process of its own, whose peak memory is measured.

    python experiments/benchmarks/archive.py --rows 10000 10000000
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

SIZE = 256
DATES = 10
FILES = 50
SENSORS = {'s1': (2, 'float32'), 's2': (13, 'uint16')}
#: Location of all tiles, in degrees.
BOUNDS = {'west': 3.0, 'south': 45.13, 'east': 3.033, 'north': 45.154}
#: Rows per write.
PART = 1_000_000


def write_files(root: Path) -> None:
    """Write uncompressed tiles of both sensors, all at the same place."""
    rng = np.random.default_rng(0)
    for sensor, (bands, dtype) in SENSORS.items():
        for i in range(FILES):
            values = rng.uniform(1, 20, (bands, SIZE, SIZE))
            pixels = (-values if sensor == 's1' else values * 100).astype(dtype)
            with rasterio.open(
                root / f'{sensor}_{i}.tif',
                'w',
                driver='GTiff',
                count=bands,
                height=SIZE,
                width=SIZE,
                dtype=dtype,
                crs='EPSG:32631',
                transform=from_origin(500_000, 5_000_000, 10, 10),
                interleave='pixel',
            ) as dst:
                dst.write(pixels)


def write_table(file: Path, rows: int) -> None:
    """Write a scanned table with the given number of rows."""
    day = np.datetime64('2018-01-01', 'us')
    grid = pa.array([[10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0]], pa.list_(pa.float64()))
    writer = None
    for start in range(0, rows, PART):
        number = np.arange(start, min(start + PART, rows))
        count = len(number)
        is_s2 = number % 2 == 1
        sensor = np.where(is_s2, 's2', 's1')
        date = number // 2 % DATES
        place = pa.array((number // (2 * DATES)).astype(str)).cast(pa.string())
        names = np.array([[f'{key}_{i}.tif' for i in range(FILES)] for key in SENSORS])
        columns = {
            'path': pa.array(names[is_s2.astype(int), number // 2 % FILES]),
            'sensor': pa.array(sensor),
            'datetime': pa.array(day + date * np.timedelta64(10, 'D')),
            'place': place,
            'crs': pa.array(np.full(count, 'EPSG:32631')),
            'transform': grid.take(pa.array(np.zeros(count, int))),
            **{name: pa.array(np.full(count, value)) for name, value in BOUNDS.items()},
            'height': pa.array(np.full(count, SIZE, np.int32)),
            'width': pa.array(np.full(count, SIZE, np.int32)),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure(file: Path, reads: int) -> dict[str, float]:
    """Open a table and read; return seconds, milliseconds and MiB."""
    from geofm.datasets import RasterArchive

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    dataset = RasterArchive(file, ['s1', 's2'])
    opened = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    times = []
    for i in rng.integers(0, len(dataset), reads + 50).tolist():
        row, col = (int(v) for v in rng.integers(0, SIZE // 2, 2))
        window = Window(col, row, SIZE // 2, SIZE // 2)
        start = time.perf_counter()
        dataset.read_pair(i, window)
        times.append(time.perf_counter() - start)
    return {
        'samples': len(dataset),
        'open_s': opened,
        'imports_mib': before / 1024,
        'peak_mib': peak / 1024,
        'read_ms': 1e3 * statistics.median(times[50:]),
    }


def main() -> None:
    """Measure, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=int, nargs='+', default=[10_000, 10_000_000])
    parser.add_argument('--reads', type=int, default=400)
    parser.add_argument('--table', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    if args.table is not None:
        print(json.dumps(measure(args.table, args.reads)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        for rows in args.rows:
            table = Path(folder) / f'{rows}.parquet'
            write_table(table, rows)
            command = [sys.executable, __file__, '--table', str(table), '--reads', str(args.reads)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[rows] = json.loads(output.splitlines()[-1])
    lines = [
        '# Opening a table of rasters and reading random windows of 128 px, two sensors',
        '',
        '| rows | samples | open, s | peak memory, MiB (before opening) | read, ms |',
        '|---:|---:|---:|---:|---:|',
        *(
            f'| {rows:,} | {r["samples"]:,} | {r["open_s"]:.2f} | {r["peak_mib"]:.0f} '
            f'({r["imports_mib"]:.0f}) | {r["read_ms"]:.2f} |'
            for rows, r in found.items()
        ),
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'archive.md').write_text('\n'.join(lines) + '\n')
    (args.output / 'archive.json').write_text(json.dumps(found, indent=1) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
