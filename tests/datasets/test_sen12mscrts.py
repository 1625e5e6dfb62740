import warnings
from collections.abc import Callable
from datetime import date
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import pytest
import rasterio
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform, transform_bounds
from rasterio.windows import Window
from torch.utils.data import DataLoader
from torchgeo.datasets import (
    DatasetNotFoundError,
    RGBBandsMissingError,
    roi_split,
    stack_samples,
    unbind_samples,
)
from torchgeo.datasets.utils import Sample, disambiguate_timestamp
from torchgeo.samplers import (
    GriddedPatchSampler,
    RandomPatchSampler,
    RandomTimestampSampler,
    SequentialTimestampSampler,
)

from geofm.datasets import SEN12MSCRTS, EmptySplitError
from geofm.datasets.pairs.skipped import Reason
from geofm.grid import Grid
from geofm.sen12ms import PIXEL_SIZE, ROIS, PairKey, SceneName
from geofm.sensors import BANDS, BandError
from tests.datasets.tree import (
    SIZE,
    grid_at,
    random_pixels,
    scene_path,
    write_pair,
    write_raster,
    write_scene,
)

KEY = PairKey('ROIs1868', 36, 0, 0)
DAY = date(2018, 2, 28)


def file_pixels(row: pd.Series) -> npt.NDArray[np.float32]:
    """Return the pixels of both files of a pair."""
    with rasterio.open(row['s1']) as s1, rasterio.open(row['s2']) as s2:
        return np.concatenate((s1.read().astype('float32'), s2.read().astype('float32')))


def query_whole(ds: SEN12MSCRTS, i: int) -> Sample:
    left, bottom, right, top = ds.index.geometry.iloc[i].bounds
    when = ds.index.index[i]
    return ds[left:right, bottom:top, when.left : when.right]


# Names


scene_names = st.builds(
    SceneName,
    sensor=st.sampled_from(('s1', 's2')),
    key=st.builds(
        PairKey,
        st.sampled_from(sorted(ROIS)),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
    ),
    date=st.dates(date(1970, 1, 1)),
)


@given(scene_names)
def test_names_are_read_as_they_are_written(name: SceneName) -> None:
    assert SceneName.parse(f'{name.folder}/{name.filename}') == name


def test_the_name_of_the_real_data_set() -> None:
    path = 'ROIs2017/32/S1/4/s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif'
    name = SceneName.parse(path)
    assert name == SceneName('s1', PairKey('ROIs2017', 32, patch=12, time_step=4), DAY)
    assert f'{name.folder}/{name.filename}' == path


@pytest.mark.parametrize(
    'name',
    [
        's3_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif',
        's1_ROIs2017_32_ImgNo_4_2018-02-30_patch_12.tif',
        's1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif.aux.xml',
        's1_ROIs2017_32_ImgNo_4_2018-02-28_patch_.tif',
        'as1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif',
        's1_ROIs2017_٣٢_ImgNo_4_2018-02-28_patch_12.tif',
    ],
)
def test_other_names_are_not_parsed(name: str) -> None:
    assert SceneName.parse(name) is None


# Pairs


def test_pairs_agree_in_all_but_sensor_and_date(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    assert len(ds) == 11
    assert ds.unpaired == 0
    assert len(ds.skipped) == 0
    for _, row in ds.index.iterrows():
        s1, s2 = SceneName.parse(row['s1']), SceneName.parse(row['s2'])
        assert s1 is not None
        assert s2 is not None
        assert (s1.sensor, s2.sensor) == ('s1', 's2')
        assert s1.key == s2.key == tuple(row[list(PairKey._fields)])
        assert (s1.date, s2.date) == (row['s1_date'].date(), row['s2_date'].date())
    keys = list(ds.index[list(PairKey._fields)].itertuples(index=False, name=None))
    assert keys == sorted(keys)


def test_listings_that_would_mislead_zip_and_sort(tmp_path: Path) -> None:
    """Patch 2 lacks its S1 and patch 10 its S2; dates and numbers sort differently as text."""
    grid = grid_at(32632, 500000, 5300000)
    for patch, days in {1: (5, 1), 3: (1, 9), 11: (2, 3)}.items():
        key = KEY._replace(patch=patch)
        write_pair(tmp_path, key, grid, *(date(2018, 1, day) for day in days))
    lone_s2 = write_scene(tmp_path, 's2', KEY._replace(patch=2), grid, DAY)
    lone_s1 = write_scene(tmp_path, 's1', KEY._replace(patch=10), grid, DAY)
    # Files with the same patch and date but another time step, ROI or season are not partners.
    lone = [
        write_scene(tmp_path, 's2', KEY._replace(patch=10, time_step=1), grid, DAY),
        write_scene(tmp_path, 's2', KEY._replace(patch=10, roi=56), grid, DAY),
        write_scene(tmp_path, 's2', KEY._replace(patch=10, season='ROIs2017'), grid, DAY),
    ]
    with pytest.warns(UserWarning, match='1 S1 without S2 .*; 4 S2 without S1|4 S2.*; 1 S1') as w:
        ds = SEN12MSCRTS(tmp_path, 'all')
    assert len(w) == 1
    assert str(lone_s1) in str(w[0].message)
    assert ds.index['patch'].tolist() == [1, 3, 11]
    assert ds.unpaired == 5
    assert ds.skipped.files[Reason.ONLY_S1] == [str(lone_s1)]
    assert set(ds.skipped.files[Reason.ONLY_S2]) == {str(lone_s2), *map(str, lone)}
    for i in range(len(ds)):
        np.testing.assert_array_equal(ds[i]['image'], file_pixels(ds.index.iloc[i]))


def test_two_files_with_the_same_key_are_left_out(tmp_path: Path) -> None:
    grid = grid_at(32632, 500000, 5300000)
    write_pair(tmp_path, KEY, grid)
    write_pair(tmp_path, KEY._replace(patch=1), grid)
    write_scene(tmp_path, 's1', KEY, grid, date(2018, 3, 1))
    with pytest.warns(UserWarning, match='2 another file has the same'):
        ds = SEN12MSCRTS(tmp_path)
    assert ds.index['patch'].tolist() == [1]
    # The S2 is not reported as a file without a partner, as it has two.
    assert (ds.skipped.count(Reason.AMBIGUOUS), len(ds.skipped)) == (2, 2)


def test_two_trees_with_the_same_place(tmp_path: Path) -> None:
    """Two files, or one file that is reached through two paths."""
    grid = grid_at(32632, 500000, 5300000)
    for folder in ('a', 'b'):
        write_pair(tmp_path / folder, KEY, grid)
    write_pair(tmp_path / 'b', KEY._replace(patch=1), grid)
    with pytest.warns(UserWarning, match='4 another file has the same'):
        assert SEN12MSCRTS([tmp_path / 'a', tmp_path / 'b']).index['patch'].tolist() == [1]
    (tmp_path / 'c').symlink_to(tmp_path / 'b')
    assert len(SEN12MSCRTS([tmp_path / 'b', tmp_path / 'c'])) == 2


def test_overlapping_paths_find_each_file_once(tree: Path) -> None:
    inner = tree / 'ROIs1868' / '..' / 'ROIs1868'
    assert len(SEN12MSCRTS([tree, inner], 'all')) == 11


def test_other_files_are_counted_and_land_cover_is_not(tmp_path: Path) -> None:
    grid = grid_at(32632, 500000, 5300000)
    write_pair(tmp_path, KEY, grid)
    classes = np.zeros((1, SIZE, SIZE), 'uint8')
    write_raster(tmp_path / 'ROIs1868/36/LC/lc_ROIs1868_36_patch_0.tif', classes, grid)
    other = write_raster(tmp_path / 'mosaic.tif', classes, grid)
    with pytest.warns(UserWarning, match='1 not named like'):
        ds = SEN12MSCRTS(tmp_path)
    assert ds.skipped.files == {Reason.NAME: [str(other)]}


# Splits and regions


def test_no_roi_is_in_two_splits(tree: Path) -> None:
    splits = [SEN12MSCRTS(tree, split) for split in ('train', 'val', 'test')]
    rois = [set(zip(ds.index['season'], ds.index['roi'], strict=True)) for ds in splits]
    assert rois == [
        {('ROIs1868', 36), ('ROIs1970', 21)},
        {('ROIs2017', 22)},
        {('ROIs2017', 32)},
    ]
    assert all(not a & b for a, b in combinations(rois, 2))
    assert sum(map(len, splits)) == len(SEN12MSCRTS(tree, 'all'))


def test_regions(tree: Path) -> None:
    assert set(SEN12MSCRTS(tree, 'all', ['africa']).index['roi']) == {21, 22, 32}
    assert set(SEN12MSCRTS(tree, 'train', ['africa']).index['roi']) == {21}
    assert len(SEN12MSCRTS(tree, 'all', ['africa', 'america'])) == 11


def test_a_list_of_files(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    files = [path for i in (3, 0) for path in ds.files_of(i)]
    listed = SEN12MSCRTS([*files, files[0]], 'all')
    pd.testing.assert_frame_equal(pd.DataFrame(listed.index), pd.DataFrame(ds.index.iloc[[0, 3]]))
    with pytest.warns(UserWarning, match=r'nothing\.tif: no such file'):
        SEN12MSCRTS([*files, tree / 'nothing.tif'], 'all')


def test_an_empty_split_lists_the_existing_rois(tree: Path) -> None:
    with pytest.raises(EmptySplitError, match=r"split='val'.*\['america'\].*ROIs2017/22 \(val\)"):
        SEN12MSCRTS(tree, 'val', ['america'])
    assert issubclass(EmptySplitError, ValueError)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=tmp_path.name):
        SEN12MSCRTS(tmp_path)


def test_bad_arguments(tree: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        SEN12MSCRTS(tree, 'valid')  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='europe'):
        SEN12MSCRTS(tree, regions=['europe'])
    with pytest.raises(ValueError, match='list of names'):
        SEN12MSCRTS(tree, regions='africa')
    with pytest.raises(BandError, match='B8a'):
        SEN12MSCRTS(tree, bands=['B8a'])


# Pixels


def check_every_pair(ds: SEN12MSCRTS) -> None:
    """A pair read by index, and by its place and time, has the pixels of its files, bit for bit."""
    for i in range(len(ds)):
        row = ds.index.iloc[i]
        for sample in (ds[i], query_whole(ds, i)):
            np.testing.assert_array_equal(sample['image'].numpy(), file_pixels(row))
            assert sample['image'].dtype == torch.float32
            s1, s2 = SceneName.parse(row['s1']), SceneName.parse(row['s2'])
            assert s1 is not None
            assert s2 is not None
            days = [np.datetime64(s1.date), np.datetime64(s2.date)]
            assert sample['dates'].numpy().astype('datetime64[D]').tolist() == [
                day.item() for day in days
            ]
            with rasterio.open(row['s2']) as src:
                assert sample['bounds'].tolist() == list(src.bounds)
                assert sample['transform'].tolist() == list(src.transform)[:6]
                assert sample['crs'].item() == src.crs.to_epsg()


def test_pixels_are_those_of_the_files(tree: Path) -> None:
    check_every_pair(SEN12MSCRTS(tree, 'all'))


def test_pixels_are_those_of_real_files(shared_data: Path) -> None:
    root = shared_data / 'real' / 'crts_layout'
    if not root.is_dir():
        pytest.skip('no real tree')
    ds = SEN12MSCRTS(root, 'all')
    assert len(ds) == 9
    assert ds.index['epsg'].nunique() == 5
    check_every_pair(ds)
    assert ds[0]['valid'].all()


def test_the_crs_of_the_dataset_may_be_changed(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all', ['america'])
    ds.crs = pyproj.CRS('EPSG:32632')
    check_every_pair(ds)


def test_numbers_count_from_both_ends(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    assert torch.equal(ds[-1]['image'], ds[10]['image'])
    assert torch.equal(ds[np.int64(3)]['image'], ds[3]['image'])
    for number in (11, -12):
        with pytest.raises(IndexError, match='of 11'):
            ds[number]


def test_bands_by_name_in_the_requested_order(tree: Path) -> None:
    bands = ('B8A', 'VH', 'B02')
    image = SEN12MSCRTS(tree, bands=bands)[0]['image']
    whole = SEN12MSCRTS(tree)[0]['image']
    assert torch.equal(image, whole[[BANDS.index(band) for band in bands]])
    assert SEN12MSCRTS(tree, bands=['VV'])[0]['image'].shape == (1, SIZE, SIZE)


def test_windows(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    for i in (0, 10):
        whole = ds[i]
        sample = ds.read_pair(i, Window(5, 3, 9, 7))
        assert torch.equal(sample['image'], whole['image'][:, 3:10, 5:14])
        assert sample['valid'].shape == (7, 9)
        a, _, c, _, e, f = sample['transform'].tolist()
        left, bottom, right, top = sample['bounds'].tolist()
        whole_left, _, _, whole_top = whole['bounds'].tolist()
        assert (left, top) == (c, f)
        assert (right, bottom) == pytest.approx((left + 9 * a, top + 7 * e), abs=1e-9)
        assert (left, top) == pytest.approx((whole_left + 5 * a, whole_top + 3 * e), abs=1e-9)


@pytest.mark.parametrize('window', [(-1, 0, 4, 4), (30, 0, 4, 4), (0, 0, 0, 4), (0.5, 0, 4, 4)])
def test_windows_outside_are_refused(tree: Path, window: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match='whole pixels'):
        SEN12MSCRTS(tree).read_pair(0, Window(*window))


def test_transforms_come_last(tree: Path) -> None:
    def keys(sample: Sample) -> Sample:
        return {**sample, 'seen': torch.tensor(len(sample))}

    assert SEN12MSCRTS(tree, transforms=keys)[0]['seen'] == 7


def test_samples_collate(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    batch = stack_samples([ds[i] for i in range(len(ds))])
    days = pd.DataFrame(ds.index)[['s1_date', 's2_date']].to_numpy('datetime64[D]')
    np.testing.assert_array_equal(batch['dates'].numpy().astype('datetime64[D]'), days)
    assert batch['dates'].dtype == batch['crs'].dtype == torch.int64


# Places and times


def test_intervals_are_whole_days(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, 'all')
    assert ds.index.index.name == 'datetime'
    assert ds.index.index.closed == 'both'
    for interval, (_, row) in zip(ds.index.index, ds.index.iterrows(), strict=True):
        days = sorted((row['s1_date'], row['s2_date']))
        start, _ = disambiguate_timestamp(f'{days[0]:%Y%m%d}', '%Y%m%d')
        _, stop = disambiguate_timestamp(f'{days[1]:%Y%m%d}', '%Y%m%d')
        assert (interval.left, interval.right) == (start, stop)


def test_aligned_boxes_give_their_size_and_pixels(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    left, _, _, top = ds.index.geometry.iloc[0].bounds
    for row, col, size in product((0, 7, 16), (0, 5, 16), (1, 13, 16)):
        x, y = left + col * PIXEL_SIZE, top - row * PIXEL_SIZE
        box = slice(x, x + size * PIXEL_SIZE), slice(y - size * PIXEL_SIZE, y)
        expected = ds[0]['image'][:, row : row + size, col : col + size]
        assert torch.equal(ds[*box]['image'], expected)


@given(st.floats(-0.49, 0.49), st.floats(-0.49, 0.49))
def test_boxes_out_of_step_with_the_pixels_keep_their_size(dx: float, dy: float) -> None:
    """The lattice of a sampler starts at the corner of the dataset, not at that of each patch."""
    ds = TREES['train']
    left, _, _, top = ds.index.geometry.iloc[0].bounds
    x, y = left + (8 + dx) * PIXEL_SIZE, top - (8 + dy) * PIXEL_SIZE
    image = ds[x : x + 16 * PIXEL_SIZE, y - 16 * PIXEL_SIZE : y]['image']
    assert torch.equal(image, ds[0]['image'][:, 8:24, 8:24])


TREES: dict[str, SEN12MSCRTS] = {}


@pytest.fixture(autouse=True)
def train_set(tree: Path) -> None:
    """The training set, for tests that hypothesis repeats."""
    TREES.setdefault('train', SEN12MSCRTS(tree))


def test_the_pair_that_fits_best_in_space_then_time_then_order(tree: Path) -> None:
    """Compare with a search through all rows."""
    ds = SEN12MSCRTS(tree, 'all')
    rng = np.random.default_rng(0)
    xmin, ymin, xmax, ymax = shapely.unary_union(ds.index.geometry.array[:8]).bounds
    checked = set()
    for _ in range(60):
        x, y = rng.uniform(xmin, xmax), rng.uniform(ymin, ymax)
        w, h = rng.uniform(2, 40, 2) * PIXEL_SIZE
        start = pd.Timestamp('2018-01-01') + pd.Timedelta(hours=float(rng.uniform(0, 240)))
        stop = start + pd.Timedelta(hours=float(rng.uniform(1, 150)))
        best: tuple[float, float, int] | None = None
        for i, (when, shape) in enumerate(zip(ds.index.index, ds.index.geometry, strict=True)):
            area = shape.intersection(shapely.box(x, y, x + w, y + h)).area
            shared = min(when.right, stop) - max(when.left, start)
            if area > 0 and shared >= pd.Timedelta(0):
                likeness = shared / (max(when.right, stop) - min(when.left, start))
                rank = (round(area / PIXEL_SIZE**2, 4), likeness, -i)
                best = max(best or rank, rank)
        if best is None:
            with pytest.raises(IndexError, match='not found'):
                ds[x : x + w, y : y + h, start:stop]
        else:
            position = -best[2]
            checked.add(position)
            sample = ds[x : x + w, y : y + h, start:stop]
            bounds = shapely.box(*sample['bounds'].tolist())
            patch = ds.index.geometry.iloc[position]
            assert bounds.buffer(-PIXEL_SIZE / 9).within(patch)
            asked = shapely.box(x, y, x + w, y + h).intersection(patch)
            assert bounds.within(asked.buffer(PIXEL_SIZE * 1.01, join_style='mitre'))
            assert asked.within(bounds.buffer(PIXEL_SIZE * 1.01, join_style='mitre'))
            row = ds.index.iloc[position]
            days = np.array([row['s1_date'], row['s2_date']], 'datetime64[D]').astype(int)
            assert sample['dates'].tolist() == days.tolist()
    assert checked == set(range(8))


def test_nested_time_intervals_are_distinguished(tmp_path: Path) -> None:
    grid = grid_at(32632, 500000, 5300000)
    write_pair(tmp_path, KEY, grid, date(2018, 1, 1), date(2018, 1, 20))
    write_pair(tmp_path, KEY._replace(time_step=1), grid, date(2018, 1, 5), date(2018, 1, 6))
    check_every_pair(SEN12MSCRTS(tmp_path))


def test_boxes_outside_all_patches_find_nothing(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    left, bottom, right, top = ds.index.geometry.iloc[0].bounds
    with pytest.raises(IndexError, match='not found'):
        ds[left - 2 * (right - left) : left, bottom:top]
    with pytest.raises(IndexError, match='not found'):
        ds[left:right, bottom:top, pd.Timestamp('2019') :]


def test_resampling_is_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match='resampl'):
        SEN12MSCRTS(tree)[11.9:12.0:1e-3, 47:48]


def test_gridded_sampler_draws_every_pixel_once(tree: Path) -> None:
    ds = SEN12MSCRTS(tree, regions=['america'])
    # The tolerance keeps the sampler from rounding up to one more row and column.
    sampler = GriddedPatchSampler(ds, size=16 + 1e-6, stride=16) @ SequentialTimestampSampler(ds)
    loader = DataLoader(ds, batch_size=4, sampler=sampler, collate_fn=stack_samples)
    images = torch.cat([batch['image'] for batch in loader])
    assert images.shape == (32, 15, 16, 16)
    for band in (1, 14):
        there = torch.cat([ds[i]['image'][band].flatten() for i in range(len(ds))])
        assert torch.equal(images[:, band].flatten().sort().values, there.sort().values)


def test_random_sampler_gives_patches_of_its_size(tmp_path: Path) -> None:
    """Also if places are shifted against each other by part of a pixel."""
    write_pair(tmp_path, KEY, grid_at(4326, 12, 47))
    write_pair(
        tmp_path,
        KEY._replace(roi=56),
        grid_at(4326, 12 + 100.37 * PIXEL_SIZE, 47),
        date(2018, 5, 1),
        date(2018, 5, 3),
    )
    ds = SEN12MSCRTS(tmp_path)
    spatial = RandomPatchSampler(ds, size=8, length=20, generator=0)
    sampler = spatial @ RandomTimestampSampler(ds, generator=0)
    loader = DataLoader(ds, batch_size=5, sampler=sampler, collate_fn=stack_samples)
    batches = list(loader)
    assert [tuple(batch['image'].shape) for batch in batches] == [(5, 15, 8, 8)] * 4
    assert len({tuple(d) for batch in batches for d in batch['dates'].tolist()}) == 2


# S1 on another grid

GROUND = CRS.from_epsg(32632)


def ground_pattern(grid: Grid) -> npt.NDArray[np.float64]:
    """Evaluate a smooth function of the ground position at the centres of the pixels."""
    rng = np.random.default_rng(1)
    rows, cols = np.mgrid[0 : grid.height, 0 : grid.width] + 0.5
    xs, ys = grid.transform @ (cols.ravel(), rows.ravel())
    east, north = (np.array(v) for v in transform(grid.crs, GROUND, xs, ys))
    waves = np.zeros(east.shape)
    for _ in range(40):
        length, angle, phase = rng.uniform(150, 600), rng.uniform(0, np.pi), rng.uniform(0, 6.3)
        along = (east - 7e5) * np.cos(angle) + (north - 5.3e6) * np.sin(angle)
        waves += np.sin(2 * np.pi * along / length + phase)
    return waves.reshape(grid.shape) / 40


def displacement(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Rows and columns by which *b* is moved against *a*.

    The peak of the correlation gives whole pixels, and a step of least squares along the gradient
    the rest.
    """
    reach, margin = 5, 12
    inner = a[margin:-margin, margin:-margin]

    def part(row: int, col: int) -> npt.NDArray[np.float64]:
        window = (
            slice(margin + v, margin + v + n) for v, n in zip((row, col), inner.shape, strict=True)
        )
        return b[*window]

    shifts = list(product(range(-reach, reach + 1), repeat=2))
    row, col = max(shifts, key=lambda s: np.corrcoef(inner.ravel(), part(*s).ravel())[0, 1])
    assert max(abs(row), abs(col)) < reach
    other = part(row, col)
    terms = np.stack((other, *np.gradient(other), np.ones_like(other)))
    gain, down, right, _ = np.linalg.lstsq(terms.reshape(4, -1).T, inner.ravel())[0]
    return row + down / gain, col + right / gain


def around(grid: Grid, epsg: int, pixel: float) -> Grid:
    """Return a grid in another CRS that covers a grid with a margin of some pixels."""
    crs = CRS.from_epsg(epsg)
    left, bottom, right, top = transform_bounds(grid.crs, crs, *grid.bounds, densify_pts=21)
    left, top = left - 4.3 * pixel, top + 3.6 * pixel
    size = int(max(right - left, top - bottom) / pixel) + 6
    return grid_at(epsg, left, top, size, pixel)


S2_GRIDS = {'utm': grid_at(32632, 714003, 5300000, 64), '4326': grid_at(4326, 11.9, 47.8, 64)}
S1_GRIDS: dict[str, Callable[[Grid], Grid]] = {
    'other zone': lambda grid: around(grid, 32633, 10.0),
    'shifted by 3.4 pixels': lambda grid: Grid(
        grid.crs, grid.transform @ Affine.translation(3.4, -3.4), *grid.shape
    ),
    '20 m pixels': lambda grid: around(grid, 32632, 20.0),
}


@pytest.mark.parametrize('s2_grid', S2_GRIDS.values(), ids=S2_GRIDS)
@pytest.mark.parametrize('moved', S1_GRIDS.values(), ids=S1_GRIDS)
def test_s1_on_another_grid_shows_the_ground_of_s2(
    tmp_path: Path, s2_grid: Grid, moved: Callable[[Grid], Grid]
) -> None:
    s1_grid = moved(s2_grid)
    s1 = np.stack([-12 + 8 * ground_pattern(s1_grid)] * 2).astype('float32')
    s2 = np.stack([3000 + 2000 * ground_pattern(s2_grid)] * 13).astype('uint16')
    write_scene(tmp_path, 's1', KEY, s1_grid, DAY, s1)
    write_scene(tmp_path, 's2', KEY, s2_grid, DAY, s2)
    ds = SEN12MSCRTS(tmp_path, bands=('VV', 'VH', 'B04'))
    sample = ds[0]
    vv, vh, red = sample['image'].double().numpy()
    assert sample['image'].shape == (3, *s2_grid.shape)
    np.testing.assert_array_equal(red, s2[3])
    assert sample['valid'][8:-8, 8:-8].all()
    assert np.abs(displacement(red, vv)).max() < 0.2
    assert np.abs(displacement(red, vh)).max() < 0.2
    # A window is read at its position in the whole patch.
    window = ds.read_pair(0, Window(10, 20, 30, 24))
    expected = sample['image'][:, 20:44, 10:40]
    torch.testing.assert_close(window['image'], expected, atol=0.3, rtol=0)


def test_the_measure_of_displacement_is_exact_enough() -> None:
    grid = S2_GRIDS['utm']
    for rows, cols in ((0.0, 0.0), (3.4, -3.4), (0.5, -0.3)):
        moved = Grid(grid.crs, grid.transform @ Affine.translation(-cols, -rows), *grid.shape)
        measured = displacement(ground_pattern(grid), ground_pattern(moved))
        assert measured == pytest.approx((rows, cols), abs=0.03)


def test_ground_not_covered_by_a_shifted_s1_is_invalid(tmp_path: Path) -> None:
    grid = grid_at(32632, 700000, 5300000)
    shifted = Grid(grid.crs, grid.transform @ Affine.translation(10, 0), *grid.shape)
    write_scene(tmp_path, 's1', KEY, shifted, DAY)
    write_scene(tmp_path, 's2', KEY, grid, DAY)
    valid = SEN12MSCRTS(tmp_path)[0]['valid']
    assert not valid[:, :10].any()
    assert valid[:, 10:].all()


# Pixels without data


def pair_with_gaps(root: Path, s1_grid: Grid, nodata: float | None = None) -> Sample:
    grid = grid_at(32632, 700000, 5300000)
    s1, s2 = random_pixels('s1', s1_grid, 1), random_pixels('s2', grid, 2)
    s1[0, 20:22] = 0
    s1[:, :, 4:8] = nodata or 0
    s2[:, 12:16] = 0
    s2[10, 24:26] = 0
    write_scene(root, 's1', KEY, s1_grid, DAY, s1, nodata)
    write_scene(root, 's2', KEY, grid, DAY, s2, nodata=0 if nodata else None)
    return SEN12MSCRTS(root)[0]


@pytest.mark.parametrize('nodata', [None, -9999.0])
def test_fill_is_invalid_and_single_zeros_are_not(tmp_path: Path, nodata: float | None) -> None:
    sample = pair_with_gaps(tmp_path, grid_at(32632, 700000, 5300000), nodata)
    expected = torch.ones(SIZE, SIZE, dtype=torch.bool)
    expected[:, 4:8] = False
    expected[12:16] = False
    assert torch.equal(sample['valid'], expected)


@pytest.mark.parametrize('nodata', [None, -9999.0])
def test_fill_does_not_affect_neighbours_when_s1_is_warped(
    tmp_path: Path, nodata: float | None
) -> None:
    sample = pair_with_gaps(tmp_path, grid_at(32632, 700000 - 4, 5300000 + 4), nodata)
    image, valid = sample['image'], sample['valid']
    assert not valid[:, 5:7].any()
    assert valid[18:, 9:-1].all()
    # Values are between -30 and 5. Averaging with 0 or -9999 would be visible in VH next to the
    # gap.
    vv_vh = image[:2, :, 3][:, valid[:, 3]]
    assert vv_vh.numel() > 0
    assert vv_vh.min() >= -30
    assert valid.float().mean() > 0.6


def test_nodata_of_one_polarisation_does_not_affect_neighbours(tmp_path: Path) -> None:
    grid = grid_at(32632, 700000, 5300000)
    s1 = random_pixels('s1', grid, 1)
    s1[1, :, 4:8] = -9999
    write_scene(tmp_path, 's1', KEY, grid_at(32632, 699996, 5300004), DAY, s1, nodata=-9999)
    write_scene(tmp_path, 's2', KEY, grid, DAY)
    sample = SEN12MSCRTS(tmp_path)[0]
    assert not sample['valid'][:, 5:7].any()
    assert sample['valid'].float().mean() > 0.8
    assert sample['image'][:2, sample['valid']].min() >= -30


def test_not_a_number_is_invalid(tmp_path: Path) -> None:
    grid = grid_at(32632, 700000, 5300000)
    s1 = random_pixels('s1', grid, 1)
    s1[0, 3, 4], s1[1, 5, 6] = np.nan, -np.inf
    write_scene(tmp_path, 's1', KEY, grid, DAY, s1)
    write_scene(tmp_path, 's2', KEY, grid, DAY)
    invalid = ~SEN12MSCRTS(tmp_path)[0]['valid']
    assert invalid.nonzero().tolist() == [[3, 4], [5, 6]]


# Invalid files


@pytest.fixture
def two_pairs(tmp_path: Path) -> Path:
    for patch in range(2):
        write_pair(tmp_path, KEY._replace(patch=patch), grid_at(32632, 500000, 5300000))
    return tmp_path


def check_left_out(root: Path, reason: Reason, path: Path) -> None:
    with pytest.warns(UserWarning, match=f'1 {reason}.*{path.name}'):
        ds = SEN12MSCRTS(root)
    assert ds.skipped.files == {reason: [str(path)]}
    assert ds.index['patch'].tolist() == [1]


@pytest.mark.parametrize('sensor', ['s1', 's2'])
def test_unreadable_files_are_left_out(two_pairs: Path, sensor: str) -> None:
    path = next(two_pairs.glob(f'**/{sensor}_*_patch_0.tif'))
    path.write_bytes(b'no tiff')
    check_left_out(two_pairs, Reason.UNREADABLE, path)


def test_files_with_other_bands_are_left_out(two_pairs: Path) -> None:
    path = next(two_pairs.glob('**/s2_*_patch_0.tif'))
    grid = grid_at(32632, 500000, 5300000)
    write_raster(path, random_pixels('s2', grid, 0)[:12], grid)
    check_left_out(two_pairs, Reason.BAND_COUNT, path)


def test_files_without_epsg_code_are_left_out(two_pairs: Path) -> None:
    path = next(two_pairs.glob('**/s2_*_patch_0.tif'))
    own = CRS.from_proj4('+proj=tmerc +lat_0=1 +lon_0=3 +k=0.99 +x_0=7 +ellps=bessel +units=m')
    grid = Grid(own, Affine.scale(10, -10), SIZE, SIZE)
    write_raster(path, random_pixels('s2', grid, 0), grid)
    check_left_out(two_pairs, Reason.NO_EPSG, path)


def test_pairs_of_different_ground_are_left_out(two_pairs: Path) -> None:
    path = next(two_pairs.glob('**/s1_*_patch_0.tif'))
    grid = grid_at(32632, 600000, 5300000)
    write_raster(path, random_pixels('s1', grid, 0), grid)
    check_left_out(two_pairs, Reason.APART, path)


@pytest.mark.parametrize('sensor', ['s1', 's2'])
def test_truncated_files_are_named_when_read(two_pairs: Path, sensor: str) -> None:
    path = next(two_pairs.glob(f'**/{sensor}_*_patch_0.tif'))
    ds = SEN12MSCRTS(two_pairs)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf'{path.name}: cannot be read \(.*delete it'):
        ds[0]
    assert ds[1]['valid'].all()


def test_missing_files_are_named(two_pairs: Path) -> None:
    ds = SEN12MSCRTS(two_pairs)
    path = Path(ds.index['s2'].iloc[0])
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        ds[0]


# Pictures


def test_plot_draws_the_available_bands(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    sample = unbind_samples(stack_samples([ds[0], ds[1]]))[1]
    sample['valid'][:9] = False
    sample['image'][0, :9] = torch.nan
    sample |= {key: torch.randint(-1, 5, (SIZE, SIZE)) for key in ('mask', 'prediction')}
    fig = ds.plot(sample, suptitle='two sensors')
    assert [ax.get_title() for ax in fig.axes] == [
        'Sentinel-2 true colour',
        'Sentinel-1 VV, VH, VV − VH',
        'Mask',
        'Prediction',
    ]
    assert fig.get_suptitle() == 'two sensors'
    true_colour = np.asarray(fig.axes[0].images[0].get_array())
    assert (true_colour[:9] == 0.5).all()
    assert true_colour[9:].min() == 0
    assert true_colour[9:].max() == 1
    plt.close(fig)


def test_plot_leaves_out_a_sensor_without_its_bands(tree: Path) -> None:
    for bands, panels in ((('VH', 'VV'), 1), (('B02', 'B03', 'B04', 'VV'), 1)):
        ds = SEN12MSCRTS(tree, bands=bands)
        fig = ds.plot(ds[0] | {'label': torch.tensor(3)}, show_titles=True)
        assert len(fig.axes) == panels
        assert 'label: 3' in fig.axes[0].get_title()
        plt.close(fig)
    ds = SEN12MSCRTS(tree, bands=('VV', 'B04'))
    with pytest.raises(RGBBandsMissingError):
        ds.plot(ds[0])


def test_plot_of_a_sample_without_valid_pixels(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    sample = ds[0]
    sample['valid'][:] = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = ds.plot(sample, show_titles=False)
    assert fig.axes[0].get_title() == ''
    plt.close(fig)


def test_scene_path_is_the_layout(tmp_path: Path) -> None:
    assert scene_path(tmp_path, 's2', KEY, DAY).relative_to(tmp_path).as_posix() == (
        'ROIs1868/36/S2/0/s2_ROIs1868_36_ImgNo_0_2018-02-28_patch_0.tif'
    )


# The index that TorchGeo's samplers use


def test_an_index_may_be_set(tree: Path) -> None:
    """Like TorchGeo's splitters: some rows, repeated, with other outlines."""
    ds = SEN12MSCRTS(tree, 'all')
    whole = [ds[i]['image'] for i in range(len(ds))]
    rows = [5, 0, 10, 5]
    part = ds.index.iloc[rows].copy()
    left, bottom, right, top = part.geometry.iloc[1].bounds
    half = shapely.box(left, bottom, (left + right) / 2, top)
    part.loc[part.index[1], 'geometry'] = half
    ds.index = part
    assert len(ds) == 4
    for i, row in enumerate(rows):
        assert torch.equal(ds[i]['image'], whole[row])
        assert ds.files_of(i) == SEN12MSCRTS(tree, 'all').files_of(row)
    when = part.index[1]
    with pytest.raises(IndexError, match='not found'):
        ds[right - PIXEL_SIZE : right, bottom:top, when.left : when.right]
    found = ds[left : left + PIXEL_SIZE, bottom:top, when.left : when.right]
    assert found['index'] == 1
    assert ds.index is part


def test_torchgeo_splits_by_place(tree: Path) -> None:
    ds = SEN12MSCRTS(tree)
    xmin, ymin, xmax, ymax = ds.index.iloc[:8].total_bounds
    middle, hair = (xmin + xmax) / 2, PIXEL_SIZE / 9
    west = shapely.box(xmin, ymin, middle - hair, ymax)
    parts = roi_split(ds, [west, shapely.box(middle + hair, ymin, xmax, ymax)])
    assert [len(part) for part in parts] == [4, 4]
    assert not {*parts[0].index['patch']} & {*parts[1].index['patch']}
    part: Any = parts[0]
    assert part[0]['image'].shape == (15, SIZE, SIZE)


def test_bounds_are_those_of_the_index(tree: Path) -> None:
    for crs in ('EPSG:4326', 'EPSG:32633'):
        ds = SEN12MSCRTS(tree, 'all')
        ds.crs = pyproj.CRS(crs)
        x, y, t = ds.bounds
        assert [x.start, y.start, x.stop, y.stop] == pytest.approx(ds.index.total_bounds.tolist())
        assert (t.start, t.stop) == (ds.index.index.left.min(), ds.index.index.right.max())
        assert ds.index.crs == ds.crs
