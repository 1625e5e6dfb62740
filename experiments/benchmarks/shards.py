"""Measure how fast samples are read from shards, beside the files they were made from.

Generated scenes of Sentinel-1 (float32) and Sentinel-2 (13 bands, uint16), 512 x 512 pixels, as
cloud-optimised GeoTIFFs with blocks of 256 x 256 pixels and deflate. A sample is a window of 256 x
256 pixels of both sensors: exactly one block of each file, which is the best case for files. Each
scene is read once, in random order, by one process, so that no data are reused between samples. The
samples are read as the data modules of geofm do: by a DataLoader, in batches of 16.

* disk: from a local disk, with the files in the page cache;
* http: from a server on 127.0.0.1 that serves byte ranges and waits --latency_ms before it answers
  each request; files through GDAL's /vsicurl/, shards through litdata's client for S3, pointed at
  the same server. Each measurement is a process of its own with empty caches.

    python experiments/benchmarks/shards.py --output experiments/results/shards.md

Before anything is timed, the samples of both are compared bit for bit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

#: Side of a scene, of a window, and of a block, in pixels.
SCENE, WINDOW = 512, 256

#: Samples in a batch.
BATCH = 16


def write_scenes(root: Path, count: int) -> None:
    """Write scenes, and a table of their files."""
    import rasterio
    from rasterio.transform import from_origin

    rng = np.random.default_rng(0)
    rows = ['path,sensor,datetime,place']
    for number in range(count):
        grid = {
            'crs': 'EPSG:32631',
            'transform': from_origin(400_000 + number * SCENE * 10, 5_000_000, 10, 10),
            'height': SCENE,
            'width': SCENE,
        }
        relief = rng.normal(size=(SCENE // 32, SCENE // 32)).repeat(32, 0).repeat(32, 1)
        s1 = (-12 + 3 * relief + rng.normal(size=(2, SCENE, SCENE))).astype(np.float32)
        s2 = 2000 + 400 * relief + 100 * rng.normal(size=(13, SCENE, SCENE))
        for key, values in (('s1', s1), ('s2', s2.clip(1, 9999).astype(np.uint16))):
            file = root / 'scenes' / f'{number}_{key}.tif'
            file.parent.mkdir(parents=True, exist_ok=True)
            options = {'driver': 'COG', 'blocksize': WINDOW, 'compress': 'deflate'}
            options |= {'overviews': 'none', 'count': len(values), 'dtype': values.dtype.name}
            with rasterio.open(file, 'w', **grid, **options) as dst:
                dst.write(values)
            rows.append(f'{file},{key},2020-06-01,{number}')
    (root / 'table.csv').write_text('\n'.join(rows) + '\n')


class Handler(BaseHTTPRequestHandler):
    """Request handler that serves byte ranges of files, each request after a delay."""

    protocol_version = 'HTTP/1.1'
    # Headers and body are two writes, between which Nagle's algorithm would wait.
    disable_nagle_algorithm = True
    requests, sent = 0, 0

    def __init__(self, root: Path, latency: float, *args: Any) -> None:
        """Handle a connection."""
        self.root, self.latency = root, latency
        super().__init__(*args)

    def do_HEAD(self) -> None:
        """Answer with the size of a file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer with a file or a range of it, or with the statistics so far."""
        if self.path == '/statistics':
            text = json.dumps({'requests': Handler.requests, 'bytes': Handler.sent}).encode()
            Handler.requests = Handler.sent = 0
            self.send_response(200)
            self.send_header('Content-Length', str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        Handler.requests += 1
        time.sleep(self.latency)
        file = self.root / self.path.split('?')[0].lstrip('/')
        if not file.is_file():
            self.send_response(404)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        size = file.stat().st_size
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        first, last = (int(asked[1]), int(asked[2] or size - 1)) if asked else (0, size - 1)
        last = min(last, size - 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header('Content-Range', f'bytes {first}-{last}/{size}')
        for name, value in (('Content-Length', last - first + 1), ('Accept-Ranges', 'bytes')):
            self.send_header(name, str(value))
        self.send_header('ETag', '"0"')
        self.send_header('Last-Modified', 'Mon, 01 Jan 2024 00:00:00 GMT')
        self.end_headers()
        if body:
            Handler.sent += last - first + 1
            with file.open('rb') as stream, suppress(ConnectionError):
                stream.seek(first)
                self.wfile.write(stream.read(last - first + 1))

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def open_dataset(kind: str, root: str) -> Any:
    """Open the plain files or the shards."""
    from geofm.datasets import RasterArchive, Shards

    if kind == 'files':
        return RasterArchive(root, ['s1', 's2'], window_size=WINDOW)
    return Shards(root, {'client_options': {'allow_http': True}} if '://' in root else None)


def measure(kind: str, root: str, scenes: int) -> dict[str, float]:
    """Read one random window per scene, in random order, in this process."""
    from torch.utils.data import DataLoader

    from geofm.datasets import Seeded

    dataset = open_dataset(kind, root)
    rng = np.random.default_rng(1)
    per_scene = len(dataset) // scenes
    numbers = rng.permutation(scenes) * per_scene + rng.integers(per_scene, size=scenes)
    # Libraries are imported and drivers are loaded by one sample, which is not counted.
    dataset[int(numbers[0])]
    if (address := os.environ.get('GEOFM_BENCHMARK_SERVER')) is not None:
        statistics(address)
    order = numbers[1:].tolist()
    start = time.perf_counter()
    for _ in DataLoader(Seeded(dataset), BATCH, sampler=order, collate_fn=list):
        pass
    seconds = time.perf_counter() - start
    found = {'samples': scenes - 1, 'seconds': seconds}
    return {**found, **(statistics(address) if address is not None else {})}


def statistics(address: str) -> dict[str, float]:
    """Return the requests to the server since the last call."""
    from urllib.request import urlopen

    with urlopen(f'{address}/statistics') as answer:
        found: dict[str, float] = json.loads(answer.read())
    return found


def run(kind: str, root: str, scenes: int, address: str | None = None) -> dict[str, float]:
    """Measure in a separate process."""
    environment = {**os.environ, 'GDAL_DISABLE_READDIR_ON_OPEN': 'EMPTY_DIR'}
    if address is not None:
        environment['GEOFM_BENCHMARK_SERVER'] = address
    command = [sys.executable, __file__, '--measure', kind, root, '--scenes', str(scenes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_same(files: Any, shards: Any) -> None:
    """Compare all samples bit for bit."""
    assert len(files) == len(shards)
    for number in range(len(files)):
        one, other = files[number], shards[number]
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value.numpy().tobytes() == other[key].numpy().tobytes()


def markdown(rows: dict[str, dict[str, float]], latency: float, scenes: int) -> str:
    """Return the table of the results."""
    lines = [
        '| | samples/s | opens or requests per sample | opens or requests/s | MB/s | speed-up |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for name, found in rows.items():
        rate = found['samples'] / found['seconds']
        base = rows[f'files, {name.split(", ")[1]}']
        ratio = rate / (base['samples'] / base['seconds'])
        per_sample = found['accesses'] / found['samples']
        lines.append(
            f'| {name} | {rate:.1f} | {per_sample:.1f} | {per_sample * rate:.0f} '
            f'| {found["bytes"] / found["seconds"] / 1e6:.0f} | {ratio:.1f} x |'
        )
    note = (
        f'\n{scenes - 1} samples of {WINDOW} x {WINDOW} pixels (after one that is not timed), one '
        f'process, batches of {BATCH}; the server waits for {latency:g} ms before each answer. '
        'Samples are equal bit for bit.\n'
    )
    return '\n'.join(lines) + '\n' + note


def main() -> None:
    """Write scenes and shards, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scenes', type=int, default=60)
    parser.add_argument('--latency_ms', type=float, default=15)
    parser.add_argument('--output', type=Path, help='Markdown file of the results')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, place = args.measure
        print(json.dumps(measure(kind, place, args.scenes)))
        return
    from geofm.cli import main as geofm

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root, args.scenes)
        table, shards = root / 'table.parquet', root / 'shards'
        geofm(['index', str(root / 'table.csv'), '--output', str(table)])
        geofm(['shard', str(table), str(shards), '--window_size', str(WINDOW)])
        check_same(open_dataset('files', str(table)), open_dataset('shards', f'{shards}/train'))
        size = sum(file.stat().st_size for file in (root / 'scenes').iterdir()) / args.scenes
        rows = {'files, disk': run('files', str(table), args.scenes)}
        # The block of a window of each of the two files.
        rows['files, disk'] |= {'accesses': 2 * (args.scenes - 1)}
        rows['files, disk'] |= {'bytes': size / 4 * (args.scenes - 1)}
        rows['shards, disk'] = run('shards', f'{shards}/train', args.scenes)
        sample = sum(f.stat().st_size for f in (shards / 'train').iterdir()) / (4 * args.scenes)
        rows['shards, disk'] |= {'bytes': sample * (args.scenes - 1)}
        handler = partial(Handler, root, args.latency_ms / 1000)
        server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        remote = root / 'remote.parquet'
        write_remote(table, remote, str(root), address)
        rows['files, http'] = run('files', str(remote), args.scenes, address)
        rows['shards, http'] = run('shards', f'{address}/shards/train', args.scenes, address)
        for name in ('files, http', 'shards, http'):
            rows[name]['accesses'] = rows[name]['requests']
        # A file is opened where a request is sent.
        rows['shards, disk']['accesses'] = rows['shards, http']['requests']
        server.shutdown()
    print(json.dumps(rows, indent=1))
    text = markdown(rows, args.latency_ms, args.scenes)
    print(text)
    if args.output:
        args.output.write_text(text)


def write_remote(table: Path, remote: Path, root: str, address: str) -> None:
    """Write a table whose files are on the server."""
    import dataclasses

    from geofm.datasets.memory.path_list import PathList
    from geofm.datasets.table import RasterTable

    read = RasterTable.read(table)
    paths = [read.path(row).replace(root, address) for row in range(len(read))]
    dataclasses.replace(read, paths=PathList.of(paths)).write(remote)


if __name__ == '__main__':
    main()
