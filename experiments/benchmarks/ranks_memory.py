"""Measure memory and epoch start of the ranks of one machine with a large table.

Processes that represent ranks set up `RasterArchiveDataModule` with one generated table of
`table.py`, start an epoch, and look up the files and grids of random samples, all at the same time.
Their memory is the proportional set size (PSS) of `/proc/PID/smaps_rollup`: a page that eight
processes map counts as an eighth for each. It is read after the imports and at the end, while all
processes are alive.

    python experiments/benchmarks/ranks_memory.py --rows 10000000 --ranks 8

The first round also makes the files that are mapped; the second one finds them.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from itertools import islice
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from table import write_table

#: Samples of the epoch that each rank looks up.
LOOK_UPS = 20_000


def pss_mib() -> dict[str, int]:
    """Return the proportional set size of this process in MiB: total and private."""
    text = Path('/proc/self/smaps_rollup').read_text()
    found = dict(re.findall(r'^(Pss(?:_Anon)?):\s+(\d+) kB', text, re.MULTILINE))
    return {name.lower(): int(size) // 1024 for name, size in found.items()}


def rank(table: Path, number: int, ranks: int, together: Barrier, results: Any) -> None:
    """Set up a rank and start an epoch."""
    os.environ['LOCAL_RANK'] = str(number)
    from geofm.datamodules import RasterArchiveDataModule
    from geofm.datamodules.sampling import ResumableSampler
    from geofm.datasets import RasterArchive

    together.wait()
    imports = pss_mib()
    together.wait()
    start = time.perf_counter()
    data = RasterArchiveDataModule(str(table), ['s1', 's2'], batch_size=64)
    if number == 0:
        data.prepare_data()
    together.wait()
    prepared = time.perf_counter() - start
    data.setup('fit')
    assert isinstance(data.train_dataset, RasterArchive)
    samples = data.train_dataset
    set_up = time.perf_counter() - start - prepared
    sampler = ResumableSampler(samples, 0, num_replicas=ranks, rank=number)
    sampler.set_epoch(1)
    start = time.perf_counter()
    order = iter(sampler)
    first = [next(order)]
    epoch = time.perf_counter() - start
    for position in [*first, *islice(order, LOOK_UPS - 1)]:
        samples.files_of(position)
        samples.matches.scene(position)
    together.wait()
    after = pss_mib()
    together.wait()
    results.put(
        {
            'rank': number,
            'prepare_s': round(prepared, 2),
            'set_up_s': round(set_up, 2),
            'epoch_start_s': round(epoch, 4),
            'imports_mib': imports['pss'],
            'beyond_imports_mib': after['pss'] - imports['pss'],
            'of_its_own_mib': after['pss_anon'] - imports['pss_anon'],
        }
    )


def measure(table: Path, ranks: int) -> list[dict[str, Any]]:
    """Start the ranks; return the measurements of each."""
    context = multiprocessing.get_context('spawn')
    together, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=rank, args=(table, number, ranks, together, results))
        for number in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=1200) for _ in processes]
    for process in processes:
        process.join()
    return sorted(found, key=lambda entry: entry['rank'])


def markdown(rows: int, rounds: list[list[dict[str, Any]]]) -> str:
    """Return the table of the results."""
    lines = [
        f'| {rows:,} rows, {len(rounds[0])} ranks | table made or mapped | set-up | epoch start '
        '| PSS after imports | additional PSS | of that, private |',
        '|---|---:|---:|---:|---:|---:|---:|',
    ]
    for name, found in zip(('first start', 'later starts'), rounds, strict=True):
        worst = {key: max(entry[key] for entry in found) for key in found[0]}
        lines.append(
            f'| {name}, worst rank | {worst["prepare_s"]:.1f} s | {worst["set_up_s"]:.2f} s '
            f'| {worst["epoch_start_s"] * 1000:.1f} ms | {worst["imports_mib"]} MiB '
            f'| {worst["beyond_imports_mib"]} MiB | {worst["of_its_own_mib"]} MiB |'
        )
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Generate a table and measure twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=10_000_000)
    parser.add_argument('--ranks', type=int, default=8)
    parser.add_argument('--output', type=Path, help='Markdown file of the results')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / 'table.parquet'
        write_table(table, args.rows)
        rounds = []
        for _ in range(2):
            rounds.append(measure(table, args.ranks))
            print(json.dumps(rounds[-1], indent=1), flush=True)
    if args.output:
        args.output.write_text(markdown(args.rows, rounds))


if __name__ == '__main__':
    main()
