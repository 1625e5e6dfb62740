"""Measure time and memory of `geofm classify` for 100,000 patches and 200 labels.

    python experiments/benchmarks/classify.py --output experiments/results/classify.md

The embeddings are generated: 384 numbers a patch, five classes. Reading, cross-validation in five
folds, fitting, classifying and writing three rasters are timed together, in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.maps.make.embeddings import write_embeddings
from geofm.maps.make.windows import Strip

ROWS, COLS, DIMENSIONS, LABELS, CLASSES = 250, 400, 384, 200, 5
METHODS = ('logistic', 'knn', 'ridge')


def generate(folder: Path) -> tuple[Path, Path]:
    """Write embeddings and labels.

    Args:
        folder: Where to write.

    Returns:
        The two files.
    """
    generator = np.random.default_rng(0)
    grid = Grid(CRS.from_epsg(32630), Affine(160, 0, 500_000, 0, -160, 4_200_000), ROWS, COLS)
    rows, cols = np.mgrid[:ROWS, :COLS]
    truth = (rows // 10 + cols // 10) % CLASSES
    centres = generator.standard_normal((CLASSES, DIMENSIONS)).astype(np.float32)

    def strips() -> list[Strip]:
        found = []
        for row in range(0, ROWS, 10):
            values = centres[truth[row : row + 10]].transpose(2, 0, 1)
            values = values + 3 * generator.standard_normal(values.shape).astype(np.float32)
            found.append(Strip(values, np.ones(values.shape[1:], bool)))
        return found

    embeddings = folder / 'scene_embedding.parquet'
    tags = {'weights_sha256': '0' * 64, 'model': 'generated'}
    write_embeddings(embeddings, grid, strips(), tags=tags)
    chosen = generator.choice(ROWS * COLS, LABELS, replace=False)
    x, y = grid.transform @ (chosen % COLS + 0.5, chosen // COLS + 0.5)
    names = [f'class {value}' for value in truth.ravel()[chosen]]
    labels = folder / 'points.gpkg'
    gpd.GeoDataFrame({'class': names}, geometry=gpd.points_from_xy(x, y), crs=32630).to_file(labels)
    return embeddings, labels


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=None)
    output = parser.parse_args().output
    lines = ['# `geofm classify`: time and memory', '']
    lines += [f'{ROWS * COLS:,} patches of {DIMENSIONS} numbers, {LABELS} labels of {CLASSES} '
              'classes, blocks of 4 km, five folds; embeddings generated. The whole command, from '
              'its start: reading, cross-validation, fitting, three Cloud-Optimised GeoTIFFs.',
              '', 'Made by `experiments/benchmarks/classify.py`.', '',
              '| Method | Wall time | CPU time | Peak memory of all runs so far |',
              '|---|---|---|---|']  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embeddings, labels = generate(folder)
        for method in METHODS:
            command = [sys.executable, '-m', 'geofm', 'classify', str(embeddings)]
            command += ['--labels', str(labels), '--output', str(folder / method)]
            command += ['--method', method, '--block_km', '4']
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            memory = after.ru_maxrss / 2**20
            lines.append(f'| {method} | {seconds:.1f} s | {used:.1f} s | {memory:.2f} GiB |')
    text = '\n'.join([*lines, ''])
    print(text)
    if output is not None:
        output.write_text(text)


if __name__ == '__main__':
    main()
