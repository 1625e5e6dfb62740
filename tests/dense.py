"""Small data sets for pixel-wise tasks, in the layouts of existing data sets."""

import json
from pathlib import Path

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from tests.datasets.tree import write_raster


def write_sen12ms(root: Path, size: int = 64) -> Path:
    """Two patches of two scenes, in the layout of TorchGeo's SEN12MS: the lower half is class 7."""
    rng = np.random.default_rng(0)
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 0, 0, -10, 0), size, size)
    seasons = ('ROIs1158_spring', 'ROIs1868_summer', 'ROIs1970_fall', 'ROIs2017_winter')
    names = [f'{season}_s2_1_p{patch}.tif' for season in seasons for patch in (1, 2)]
    for name in names:
        season, patch = '_'.join(name.split('_')[:2]), name.split('_')[-1]
        classes = np.ones((4, size, size), 'uint16')
        classes[:, size // 2 :] = 7
        pixels = {
            's1': rng.uniform(-25, 0, (2, size, size)).astype('float32'),
            's2': rng.integers(1, 9000, (13, size, size), dtype='uint16'),
            'lc': classes,
        }
        for kind, values in pixels.items():
            write_raster(root / season / f'{kind}_1' / f'{season}_{kind}_1_{patch}', values, grid)
    for split in ('train', 'test'):
        (root / f'{split}_list.txt').write_text('\n'.join(names))
    return root


def write_dfc2020(root: Path, size: int = 64) -> Path:
    """Four patches, in the layout of TorchGeo's Copernicus-Bench DFC2020."""
    rng = np.random.default_rng(0)
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 0, 0, -10, 0), size, size)
    folder = root / 'dfc2020_s1s2'
    names = [f'ROIs0000_test_dfc_0_p{i}.tif' for i in range(4)]
    for name in names:
        pixels = {
            's1': rng.uniform(-25, 0, (2, size, size)).astype('float32'),
            's2': rng.integers(1, 9000, (13, size, size), dtype='uint16'),
            'dfc': rng.integers(0, 11, (1, size, size), dtype='uint8'),
        }
        for kind, values in pixels.items():
            write_raster(folder / kind / name.replace('dfc', kind), values, grid)
    for split in ('train', 'val', 'test'):
        (folder / f'dfc-{split}-new.csv').write_text('\n'.join(names))
    return root


def write_mmflood(root: Path, size: int = 96) -> Path:
    """A tile per split, in the layout of TorchGeo's MMFlood: a slope from 0 to 190 m.

    Sentinel-1, in linear power, is missing in the four westernmost columns.
    """
    rng = np.random.default_rng(0)
    activations = {}
    for i, split in enumerate(('train', 'val', 'test')):
        place = f'EMSR00{i}-0'
        activations[f'EMSR00{i}'] = {'subset': split}
        grid = Grid(CRS.from_epsg(4326), Affine(1e-4, 0, 10 + i, 0, -1e-4, 45), size, size)
        power = rng.uniform(0.01, 1, (2, size, size)).astype('float32')
        power[:, :, :4] = np.nan
        slope = np.linspace(0, 190, size, dtype='float32')[None, :, None]
        pixels = {
            's1_raw': power,
            'DEM': np.broadcast_to(slope, (1, size, size)),
            'mask': np.zeros((1, size, size), 'float32'),
        }
        for kind, values in pixels.items():
            write_raster(root / 'activations' / place / kind / f'{place}.tif', values, grid)
    (root / 'activations.json').write_text(json.dumps(activations))
    return root
