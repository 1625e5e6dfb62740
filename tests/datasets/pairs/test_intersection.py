from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import transform
from torch.utils.data import DataLoader
from torchgeo.datasets import IntersectionDataset, RasterDataset, stack_samples
from torchgeo.samplers import RandomPatchSampler

from geofm.datasets import SEN12MSCRTS
from geofm.grid import Grid
from geofm.sen12ms import PairKey
from tests.datasets.tree import SIZE, grid_at, write_raster, write_scene

KEY = PairKey('ROIs1868', 36, 0, 0)
DAY = date(2018, 2, 28)


class Labels(RasterDataset):
    filename_glob = 'labels*.tif'
    is_image = False


def write_labelled(root: Path, grid: Grid, label_grid: Grid | None = None) -> tuple[Path, Path]:
    """A pair whose B02 and B03 hold column and row, and a raster of labels that holds both.

    Where the labels have a grid of their own, a label is the number of the 100 m block instead.
    """
    cols, rows = np.meshgrid(np.arange(grid.width), np.arange(grid.height))
    pixels = np.full((13, *grid.shape), 1000, 'uint16')
    pixels[1], pixels[2] = 500 + cols, 500 + rows
    write_scene(root / 'pairs', 's1', KEY, grid, DAY)
    write_scene(root / 'pairs', 's2', KEY, grid, DAY, pixels)
    labels = (cols * 100 + rows).astype('int32')[None]
    if label_grid is not None:
        cols, rows = np.meshgrid(np.arange(label_grid.width), np.arange(label_grid.height))
        labels = (cols * 100 + rows).astype('int32')[None]
    write_raster(root / 'labels' / 'labels.tif', labels, label_grid or grid)
    return root / 'pairs', root / 'labels'


def samples(ds: IntersectionDataset, size: int) -> list[dict[str, torch.Tensor]]:
    sampler = RandomPatchSampler(ds, size=size, length=4)
    return [ds[query] for query in sampler]


def is_aligned(sample: dict[str, torch.Tensor]) -> bool:
    mask = sample['mask'].squeeze()
    col, row = sample['image'][3].long() - 500, sample['image'][4].long() - 500
    return torch.equal(mask // 100, col) and torch.equal(mask % 100, row)


@pytest.mark.parametrize(
    'grid',
    [
        grid_at(4326, 11.5, 48.1),
        grid_at(32632, 500000, 5300000),
        Grid(grid_at(32632, 0, 0).crs, Affine(10, 0, 5e5, 0, 10, 5.3e6), SIZE, SIZE),
    ],
    ids=['degrees', 'utm', 'south-up'],
)
def test_labels_are_on_the_pixels_of_the_pair(tmp_path: Path, grid: Grid) -> None:
    pairs, labels = write_labelled(tmp_path, grid)
    ds = SEN12MSCRTS(pairs, split='all') & Labels(labels)
    for sample in samples(ds, 16):
        assert is_aligned(sample)
        assert sample['image'].shape[0] == 15
        assert sample['bounds'].shape == (4,)
        assert sample['transform'].shape == (6,)


def test_labels_in_another_crs_are_warped_onto_the_pair(tmp_path: Path) -> None:
    # Labels of 90 m in degrees around a pair in UTM, resampled by nearest neighbours.
    grid = grid_at(32632, 500000, 5300000)
    left, _, _, top = grid.footprint(grid_at(4326, 0, 0).crs).bounds
    coarse = grid_at(4326, left - 0.002, top + 0.002, size=12, pixel=8e-4)
    pairs, labels = write_labelled(tmp_path, grid, coarse)
    other = Labels(labels)
    assert other.resampling == Resampling.nearest
    ds = SEN12MSCRTS(pairs, split='all') & other
    (row,) = range(len(ds.index))
    left, bottom, right, top = ds.index.geometry.iloc[row].bounds
    when = ds.index.index[row]
    sample = ds[left:right, bottom:top, when.left : when.right]
    # Reference: project the centre of each pixel and look up the label under it.
    cols, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    xs, ys = grid.transform @ (cols.ravel(), rows.ravel())
    lon, lat = transform(grid.crs, coarse.crs, xs, ys)
    label_cols, label_rows = ~coarse.transform @ (np.array(lon), np.array(lat))
    want = (np.floor(label_cols) * 100 + np.floor(label_rows)).reshape(SIZE, SIZE)
    same = (sample['mask'].numpy() == want).mean()
    # A pixel on the border of two labels may have either.
    assert same > 0.98


def test_joined_samples_make_batches(tmp_path: Path) -> None:
    pairs, labels = write_labelled(tmp_path, grid_at(4326, 11.5, 48.1))
    ds = SEN12MSCRTS(pairs, split='all') & Labels(labels)
    loader: DataLoader[object] = DataLoader(
        ds, 2, sampler=RandomPatchSampler(ds, size=16, length=2), collate_fn=stack_samples
    )
    batch = next(iter(loader))
    assert isinstance(batch, dict)
    assert batch['image'].shape == (2, 15, 16, 16)
    assert batch['mask'].shape[-2:] == (16, 16)
    assert batch['index'].tolist() == [0, 0]


def test_a_rotated_grid_is_refused(tmp_path: Path) -> None:
    crs = grid_at(32632, 0, 0).crs
    transform = Affine.translation(5e5, 5.3e6) @ Affine.rotation(20) @ Affine.scale(10, -10)
    rotated = Grid(crs, transform, SIZE, SIZE)
    pairs, labels = write_labelled(tmp_path, rotated, grid_at(32632, 499000, 5301000, 200))
    ds = SEN12MSCRTS(pairs, split='all') & Labels(labels)
    with pytest.raises(ValueError, match='rotated grid'):
        samples(ds, 16)


def test_only_rasters_and_vectors_can_be_joined(tmp_path: Path) -> None:
    pairs, _ = write_labelled(tmp_path, grid_at(4326, 11.5, 48.1))
    ds = SEN12MSCRTS(pairs, split='all')
    with pytest.raises(TypeError, match='not with SEN12MSCRTS'):
        ds & ds
