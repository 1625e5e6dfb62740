"""Measure the memory of mapping scenes of different sizes.

A scene of the size of a Sentinel-2 tile is generated on disk, and `geofm map` makes all products of
it with a tiny model, in a process of its own. The peak is the largest sum of resident memory of
that process and its children, sampled ten times a second, or the peak of the process as recorded by
Linux if that is more.

    python experiments/benchmarks/map_memory.py --side 10980 --smaller 2745
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import timm
import torch
from rasterio.transform import Affine
from rasterio.windows import Window

import geofm.models  # noqa: F401  registers the models
from geofm.maps import Options, map_scene
from geofm.sensors import DEFAULT_SENSORS, SENSORS

MODEL, LAYERS = 'geofm_vit_tiny_patch16_linear', 2
TILE = 512


def write_scene(path: Path, key: str, side: int) -> None:
    """Write a scene of noise over smooth ground, as tiled, compressed GeoTIFF."""
    bands = SENSORS[key].bands
    mean, std = (
        np.array([getattr(band, what) for band in bands], np.float32)[:, None, None]
        for what in ('mean', 'std')
    )
    random = np.random.default_rng(0)
    profile = {
        'driver': 'GTiff',
        'dtype': 'float32' if key == 's1' else 'uint16',
        'count': len(bands),
        'height': side,
        'width': side,
        'crs': 'EPSG:32630',
        'transform': Affine(10, 0, 600_000, 0, -10, 4_200_000),
        'tiled': True,
        'blockxsize': TILE,
        'blockysize': TILE,
        'compress': 'zstd',
        'zstd_level': 1,
        'interleave': 'band',
        'bigtiff': 'if_safer',
    }
    with rasterio.open(path, 'w', **profile) as dst:
        dst.descriptions = tuple(band.name for band in bands)
        for row in range(0, side, TILE):
            rows = min(TILE, side - row)
            y, x = np.mgrid[row : row + rows, :side].astype(np.float32)
            ground = np.sin(x / 300) * np.cos(y / 500)
            noise = random.integers(-8, 9, (rows, side)).astype(np.float32) / 16
            pixels = mean + std * (ground + noise)
            if key == 's2':
                pixels = pixels.clip(1, 20_000)
            dst.write(pixels.astype(profile['dtype']), window=Window(0, row, side, rows))


def map_all(s1: Path, s2: Path, output: Path, threads: int) -> None:
    """Write all products, in the measured process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, in_chans=15, depth=LAYERS)
    map_scene(model, s1, s2, output, options=Options(precision='int8'))


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process, as Linux records it.

    Not what the kernel notes of a child that has ended (ru_maxrss): that begins with the memory of
    the process which started it, and this one has written a scene.
    """
    try:
        lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError:
        return 0  # it ended meanwhile
    return max(
        (1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM')), default=0
    )


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children, as Linux counts it."""
    total = 0
    for directory in Path('/proc').glob('[0-9]*'):
        try:
            parent = int((directory / 'stat').read_text().rpartition(')')[2].split()[1])
            if pid in (int(directory.name), parent):
                pages = int((directory / 'statm').read_text().split()[1])
                total += pages * os.sysconf('SC_PAGESIZE')
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return total


def measure(side: int, threads: int) -> dict[str, float]:
    """Return peak memory and time of mapping a scene with the given side."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        scenes = {key: folder / f'{key}_2018-02-24.tif' for key in DEFAULT_SENSORS}
        for key, path in scenes.items():
            write_scene(path, key, side)
        start = time.perf_counter()
        command = [sys.executable, __file__, '--map', str(folder), '--threads', str(threads)]
        process = subprocess.Popen(command)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid), peak_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f'the run of {side} px failed: {process.returncode}')
        return {
            'side': side,
            'peak_mib': peak / 2**20,
            'seconds': seconds,
            'products_mib': sum(p.stat().st_size for p in (folder / 'maps').iterdir()) / 2**20,
        }


def main() -> None:
    """Measure scenes of two sizes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--side', type=int, default=10_980)
    parser.add_argument('--smaller', type=int, default=2_745)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    parser.add_argument('--map', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.map is not None:
        s1, s2 = (args.map / f'{key}_2018-02-24.tif' for key in DEFAULT_SENSORS)
        map_all(s1, s2, args.map / 'maps', args.threads)
        return
    rows = [measure(side, args.threads) for side in (args.smaller, args.side)]
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        'model': f'{MODEL}, {LAYERS} blocks',
        'machine': platform.processor() or platform.machine(),
        'threads': args.threads,
        'torch': torch.__version__,
        'gdal': rasterio.__gdal_version__,
        'scenes': rows,
    }
    (args.output / 'map_memory.json').write_text(json.dumps(result, indent=2) + '\n')
    table = ['| scene | peak memory | time | products |', '|---|---:|---:|---:|']
    table += [
        f'| {row["side"]:,.0f} x {row["side"]:,.0f} px | {row["peak_mib"]:,.0f} MiB '
        f'| {row["seconds"]:,.0f} s | {row["products_mib"]:,.0f} MiB |'
        for row in rows
    ]
    text = '\n'.join(table) + '\n'
    (args.output / 'map_memory.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
