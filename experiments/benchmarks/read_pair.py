"""Compare the speed at which a pair of Sentinel-1 and Sentinel-2 patches is read.

Files are as in SEN12MS-CR-TS: 256 px, uncompressed, interleaved by pixel, and in the page cache.
Readers take turns, so that other load on the machine affects all of them equally. Compare ratios
within a run rather than times of different runs.

    python experiments/benchmarks/read_pair.py
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from torchgeo.datasets import RasterDataset

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue.catalogue import update_catalogue
from geofm.sen12ms import PIXEL_SIZE, PairKey, SceneName

SIZE = 256
A_ROW = 20

Reader = Callable[[int], object]


def write_tree(root: Path, pairs: int) -> None:
    """Write patches side by side in one ROI."""
    rng = np.random.default_rng(0)
    pixels = {
        's1': rng.uniform(-25, 0, (2, SIZE, SIZE)).astype('float32'),
        's2': rng.integers(1, 10_000, (13, SIZE, SIZE), dtype='uint16'),
    }
    for patch in range(pairs):
        row, col = divmod(patch, A_ROW)
        corner = Affine.translation(10 + col * SIZE * PIXEL_SIZE, 50 - row * SIZE * PIXEL_SIZE)
        for sensor, values in pixels.items():
            name = SceneName(sensor, PairKey('ROIs1868', 36, patch, 0), date(2018, 2, 1))
            path = root / name.folder / name.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                path,
                'w',
                driver='GTiff',
                count=len(values),
                height=SIZE,
                width=SIZE,
                dtype=values.dtype,
                crs=CRS.from_epsg(4326),
                transform=corner @ Affine.scale(PIXEL_SIZE, -PIXEL_SIZE),
                interleave='pixel',
            ) as dst:
                dst.write(values)


class _S1(RasterDataset):
    filename_glob = 's1_*.tif'
    filename_regex = r's1_.*_(?P<date>\d{4}-\d{2}-\d{2})_patch'
    date_format = '%Y-%m-%d'


class _S2(_S1):
    filename_glob = 's2_*.tif'
    filename_regex = r's2_.*_(?P<date>\d{4}-\d{2}-\d{2})_patch'


def readers(root: Path) -> dict[str, Reader]:
    """Return the readers by name."""
    pairs = SEN12MSCRTS(root)
    both = _S1(root) & _S2(root)
    index = pairs.index

    def bare(i: int) -> object:
        arrays = []
        for path in (index['s1'].iloc[i], index['s2'].iloc[i]):
            with rasterio.open(path) as src:
                arrays.append(src.read())
        return arrays

    def torchgeo(i: int) -> object:
        left, bottom, right, top = index.geometry.iloc[i].bounds
        when = index.index[i]
        return both[left:right, bottom:top, when.left : when.right]

    assert torch.equal(pairs[3]['image'][:2], torch.from_numpy(bare(3)[0]))  # type: ignore[index]
    return {
        'rasterio, open and read': bare,
        'geofm SEN12MSCRTS': pairs.read_pair,
        'TorchGeo IntersectionDataset': torchgeo,
    }


def main() -> None:
    """Measure, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--pairs', type=int, default=500)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--read', type=int, default=100, help='pairs that a round reads')
    parser.add_argument('--output', type=Path, default=Path('experiments/results'))
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tree(root, args.pairs)
        update_catalogue(root)
        measured = readers(root)
        rng = np.random.default_rng(0)
        for _ in range(args.rounds):
            chosen = rng.integers(0, args.pairs, args.read).tolist()
            for name, reader in measured.items():
                start = time.perf_counter()
                for i in chosen:
                    reader(i)
                times.setdefault(name, []).append(time.perf_counter() - start)
    milliseconds = {k: 1e3 * statistics.median(v) / args.read for k, v in times.items()}
    bare = milliseconds['rasterio, open and read']
    lines = [
        f'# Reading a pair of {SIZE} px, {2 * args.pairs} files, page cache warm',
        '',
        f'{platform.processor() or platform.machine()}, one thread, median of {args.rounds} '
        f'interleaved rounds of {args.read} pairs.',
        '',
        '| | ms a pair | times rasterio |',
        '|---|---:|---:|',
        *(f'| {name} | {ms:.2f} | {ms / bare:.2f} |' for name, ms in milliseconds.items()),
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'read_pair.md').write_text('\n'.join(lines) + '\n')
    content = {'ms': milliseconds, 'rounds_s': times, 'pairs': args.pairs, 'read': args.read}
    (args.output / 'read_pair.json').write_text(json.dumps(content, indent=1) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
