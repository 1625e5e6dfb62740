"""Samples of generated archives."""

import pickle
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rasterio.windows import Window
from torch.utils.data import DataLoader
from torchgeo.samplers import GriddedPatchSampler

from geofm.datasets import EmptySplitError, MultiDate, RasterArchive
from geofm.datasets.table import RasterTable, TableError, read_observation
from geofm.sensors import SENSORS, register_sensors
from tests.datasets.archive.tables import day, sample_table, table_of
from tests.datasets.table.rasters import dn, write_raster
from tests.registry import kept_registry

SENSORS_HERE = ('s1', 's2', 'dem')
NAT = np.iinfo(np.int64).min


@pytest.fixture(scope='module')
def table(module_path: Path) -> RasterTable:
    """Six places of 240 px, two dates, and elevation with pixels of 30 m."""
    return sample_table(module_path / 'scenes', size=240, dates=2)


def pixels_of(path: str, window: Window) -> torch.Tensor:
    with rasterio.open(path) as src:
        return torch.from_numpy(src.read(window=window).astype(np.float32))


def test_windows_are_the_pixels_of_the_files(table: RasterTable) -> None:
    ds = RasterArchive(table, SENSORS_HERE, window_size=100)
    assert ds.reference == 's2'
    assert len(ds) == 6 * 2 * 9
    assert ds.bands[-1] == 'dem.elevation'
    for i in range(0, len(ds), 7):
        sample, row = ds[i], ds.index.iloc[i]
        window = Window(row['col'], row['row'], row['width'], row['height'])
        assert torch.equal(sample['image'][:2], pixels_of(row['s1'], window))
        assert torch.equal(sample['image'][2:15], pixels_of(row['s2'], window))
        grid = ds.matches.grid(i)
        numbers = [int(n) for n in ds.matches.rows_of(i, 'dem')]  # type: ignore[union-attr]
        warped, _ = read_observation(table, numbers, grid=grid)
        assert torch.equal(sample['image'][15:], torch.from_numpy(warped))
        days = [row['s1_date'], row['s2_date']]
        assert sample['dates'].tolist() == [
            *(int(d.to_datetime64().astype('datetime64[D]').astype(int)) for d in days),
            NAT,
        ]
        assert sample['bounds'].tolist() == list(grid.bounds)
        assert 'present' not in sample
        assert row['place'] in row['s1']
        assert len(ds.files_of(i)) == 3


def test_a_window_of_a_sample_is_a_part_of_it(table: RasterTable) -> None:
    ds = RasterArchive(table, SENSORS_HERE, window_size=100)
    whole, part = ds[5], ds.read_pair(5, Window(10, 20, 30, 40))
    assert torch.equal(part['image'][:15], whole['image'][:15, 20:60, 10:40])
    with pytest.raises(ValueError, match='whole pixels inside 100 rows'):
        ds.read_pair(5, Window(80, 0, 30, 30))


def test_slices_give_the_sample_of_a_row(table: RasterTable) -> None:
    ds = RasterArchive(table, ('s2',), ['B04'], window_size=120)
    for i in range(0, len(ds), 5):
        left, bottom, right, top = ds.index.geometry.iloc[i].bounds
        when = ds.index.index[i]
        sample = ds[left:right, bottom:top, when.left : when.right]
        assert int(sample['index']) == i
    ds.index = ds.index.iloc[[3, 1]]
    assert len(ds) == 2
    assert torch.equal(
        ds[1]['image'], RasterArchive(table, ('s2',), ['B04'], window_size=120)[1]['image']
    )


def test_samplers_of_torchgeo(table: RasterTable) -> None:
    zone = np.flatnonzero(table.epsg == np.bincount(table.epsg).argmax())
    ds = RasterArchive(table.take(zone), ('s2',), ['B04'])
    assert ds.crs.to_epsg() == table.epsg[zone[0]]
    assert ds.res == (10.0, 10.0)
    sampler = GriddedPatchSampler(ds, size=60, stride=60)
    shapes = {tuple(ds[query]['image'].shape) for query in list(sampler)[:6]}
    assert shapes == {(1, 60, 60)}


def test_dates_of_a_place(table: RasterTable) -> None:
    ds = RasterArchive(table, SENSORS_HERE, window_size=120)
    places = MultiDate(ds, 2)
    assert len(places) == len(ds) // 2
    sample = places[3]
    assert sample['image'].shape == (2, 16, 120, 120)
    one, two = (ds[int(n)] for n in sample['pairs'])
    assert torch.equal(one['transform'], two['transform'])
    assert one['dates'][1] != two['dates'][1]


def test_workers_read_the_same(table: RasterTable, forkserver: ForkServerContext) -> None:
    ds = RasterArchive(table, SENSORS_HERE, window_size=120)
    assert ds.index is not None
    loader = DataLoader(ds, batch_size=4, num_workers=1, multiprocessing_context=forkserver)
    batch = next(iter(loader))
    assert torch.equal(batch['image'], torch.stack([ds[i]['image'] for i in range(4)]))
    again = pickle.loads(pickle.dumps(ds))
    assert torch.equal(again[7]['image'], ds[7]['image'])


def write_places(root: Path, rows: list[tuple[str, str, str]], **kwargs: Any) -> RasterTable:
    """Write rasters of 16 px given as (place, sensor, date), all at the same location."""
    listed = []
    for i, (place, sensor, date) in enumerate(rows):
        bands = len(SENSORS[sensor].bands)
        write_raster(root / f'{i}.tif', dn((bands, 16, 16), i, **kwargs))
        listed.append({'path': f'{i}.tif', 'sensor': sensor, 'datetime': date, 'place': place})
    return table_of(root / 'table.csv', listed)


def test_missing_sensors_are_left_out_or_marked(tmp_path: Path) -> None:
    rows = [('a', 's2', day(0)), ('a', 'dem', ''), ('b', 's2', day(0)), ('b', 's1', day(9))]
    table = write_places(tmp_path, rows, dtype='float32')
    with pytest.warns(UserWarning, match=r'1 sample without dem of the place.*2\.tif'):
        assert len(RasterArchive(table, ('s2', 'dem'))) == 1
    with pytest.raises(EmptySplitError, match='no sample with all sensors'):
        RasterArchive(table, ('s1', 's2', 'dem'))
    ds = RasterArchive(table, ('s1', 's2', 'dem'), allow_missing=('s1', 'dem'))
    first, second = ds[0], ds[1]
    assert first['present'].tolist() == [False, True, True]
    assert second['present'].tolist() == [True, True, False]
    assert (first['image'][:2] == 0).all()
    assert first['valid'].all()
    assert first['dates'].tolist()[0] == NAT
    with pytest.raises(ValueError, match='other than the reference'):
        RasterArchive(table, ('s1', 's2'), allow_missing=('s2',))
    with pytest.raises(EmptySplitError, match='without s1 of the place within 3 days'):
        RasterArchive(table, ('s1', 's2'), max_day_gap=3)
    assert len(RasterArchive(table, ('s1', 's2'), max_day_gap=9)) == 1


def test_footprints_match_without_places(tmp_path: Path) -> None:
    listed = []
    for name, sensor, x, y, res, size in (
        ('s2', 's2', 500_000, 5_000_000, 10, 64),
        ('west', 'dem', 499_000, 5_000_500, 30, 45),
        ('east', 'dem', 500_350, 5_000_500, 30, 45),
    ):
        bands = len(SENSORS[sensor].bands)
        write_raster(
            tmp_path / f'{name}.tif',
            dn((bands, size, size), 1, 'float32'),
            transform=from_origin(x, y, res, res),
        )
        date = day(0) if sensor == 's2' else ''
        listed.append({'path': f'{name}.tif', 'sensor': sensor, 'datetime': date})
    ds = RasterArchive(table_of(tmp_path / 't.csv', listed), ('s2', 'dem'), window_size=32)
    names = [Path(path).stem for path in ds.index['dem']]
    assert names == ['west', 'east', 'west', 'east']
    # Pixels that are not covered by a tile are not valid.
    assert ds[1]['valid'][:, :2].sum() == 0
    assert ds[1]['valid'][:, 6:].all()
    assert ds.index['overlap'].tolist() == pytest.approx([1, 29 / 32, 1, 29 / 32], abs=0.02)


def write_tiles(root: Path, sizes: dict[str, tuple[int, int]]) -> RasterTable:
    """Write tiles without a CRS, named PLACE_SENSOR."""
    listed = []
    for name, (height, width) in sizes.items():
        place, sensor = name.split('_')
        pixels = dn((3 if sensor == 'rgb' else 1, height, width), 3) % 255
        kind = 'uint8' if sensor == 'rgb' else 'float32'
        with rasterio.open(
            root / f'{name}.tif',
            'w',
            driver='GTiff',
            count=len(pixels),
            height=height,
            width=width,
            dtype=kind,
        ) as dst:
            dst.write(pixels.astype(kind))
        path = f'{name}.tif'
        listed.append({'path': path, 'sensor': sensor, 'datetime': '', 'place': place})
    return table_of(root / 'table.csv', listed)


@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
def test_tiles_without_crs(tmp_path: Path) -> None:
    size = (50, 40)
    table = write_tiles(tmp_path, dict.fromkeys(('a_rgb', 'a_dem', 'b_rgb', 'b_dem'), size))
    ds = RasterArchive(table, ('rgb', 'dem'), window_size=32)
    assert len(ds) == 2 * 4
    sample = ds[3]
    assert set(sample) == {'image', 'valid', 'dates', 'index'}
    with rasterio.open(tmp_path / 'a_rgb.tif') as src:
        want = src.read(window=Window(8, 18, 32, 32))
    assert torch.equal(
        sample['image'][ds.bands.index('rgb.red')], torch.from_numpy(want[0]).float()
    )
    assert str(ds).endswith('size: 8')
    for ask in (lambda: ds.index, lambda: ds.bounds, lambda: ds[0:1, 0:1]):
        with pytest.raises(
            ValueError, match=r'no CRS, so samples have no location.*by their index'
        ):
            ask()
    with pytest.raises(ValueError, match='cannot be split by blocks'):
        RasterArchive(table, ('rgb',), split_by={'by': 'blocks'})
    assert len(RasterArchive(table, ('rgb',), split_by={'by': 'place', 'test': 0})) == 1
    assert len(MultiDate(ds, 2)) == 8


@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
def test_sizes_must_agree_without_crs(tmp_path: Path) -> None:
    table = write_tiles(tmp_path, {'a_rgb': (50, 40), 'a_dem': (25, 20)})
    with pytest.raises(TableError, match=r'a_dem.tif is 25 x 20.*a_rgb.tif.*50 x 40.*one size'):
        RasterArchive(table, ('rgb', 'dem'), reference='rgb')


def test_wrong_arguments_are_refused(table: RasterTable) -> None:
    for kwargs, said in (
        ({'split': 'dev'}, "unknown split 'dev'"),
        ({'edge': 'cut'}, "unknown edge 'cut'"),
        ({'on_error': 'hide'}, "unknown on_error 'hide'"),
        ({'window_size': 0}, 'positive number of pixels'),
        ({'max_day_gap': -1}, '0 days or more'),
        ({'min_overlap': 2}, 'from 0 to 1'),
        ({'reference': 'dem'}, 'not one of the sensors'),
        ({'allow_missing': ['s2']}, 'to allow a missing s2, choose another reference'),
        ({'bands': ['VV']}, r"sensors \['s1'\], which are not in"),
    ):
        with pytest.raises(ValueError, match=said):
            RasterArchive(table, ('s2',), **kwargs)
    with pytest.raises(ValueError, match=r"no bands of \['s2'\]"):
        RasterArchive(table, ('s1', 's2'), ['VV'])
    with pytest.raises(TableError, match="no file of the sensor 'landsat'"):
        RasterArchive(table, ('landsat',))
    with pytest.raises(EmptySplitError, match="add a column 'split' to the table"):
        RasterArchive(table, ('s2',), split='val')


def test_left_out_samples_are_counted_with_advice(tmp_path: Path) -> None:
    places = [('a', 's2'), ('a', 's1'), ('b', 's1'), ('c', 's1'), ('d', 's2')]
    table = write_places(tmp_path, [(p, key, day(0)) for p, key in places], dtype='float32')
    with pytest.warns(UserWarning, match='left out') as caught:
        ds = RasterArchive(table, ('s1', 's2'))
    assert len(ds) == ds.matches.count_places() == 1
    said = str(caught[0].message)
    assert '2 places with s1 but without the reference sensor s2' in said
    assert '1 sample without s1 of the place' in said
    assert "(allow_missing=['s1'] keeps them)" in said
    with pytest.warns(UserWarning, match='1 place with s2 but without the reference sensor s1'):
        other = RasterArchive(table, ('s1', 's2'), reference='s1', allow_missing=['s2'])
    assert len(other) == 3


def test_files_without_a_band_are_left_out(tmp_path: Path) -> None:
    for name in ('a', 'b'):
        write_raster(tmp_path / f'{name}.tif', dn((2, 16, 16)))
    rows = [
        {'path': 'a.tif', 'sensor': 's2', 'datetime': day(0), 'place': 'a', 'band': 'B02 B03'},
        {'path': 'b.tif', 'sensor': 's2', 'datetime': day(0), 'place': 'b', 'band': 'B02 B04'},
    ]
    table = table_of(tmp_path / 'table.csv', rows)
    with pytest.warns(UserWarning, match='1 observation of s2 without some of the requested bands'):
        ds = RasterArchive(table, ('s2',), ['B04', 'B02'])
    with rasterio.open(tmp_path / 'b.tif') as src:
        want = src.read([2, 1]).astype(np.float32)
    assert torch.equal(ds[0]['image'], torch.from_numpy(want))


def test_broken_files_are_replaced(tmp_path: Path) -> None:
    table = write_places(tmp_path, [(p, 's2', day(0)) for p in 'abc'])
    (tmp_path / '1.tif').write_bytes(b'II*\0broken')
    with pytest.raises(ValueError, match=r'1\.tif: cannot be read'):
        RasterArchive(table, ('s2',))[1]
    ds = RasterArchive(table, ('s2',), on_error='skip')
    assert int(ds[1]['index']) in (0, 2)
    assert ds.failures == 1


def test_a_sensor_may_have_more_bands_than_an_integer_has_bits(tmp_path: Path) -> None:
    bands = [{'name': f'c{i}', 'mean': 1, 'std': 1} for i in range(70)]
    definition = {'title': 'Hyper', 'quantity': 'other', 'unit': 'x', 'bands': bands}
    image = np.random.default_rng(0).uniform(1, 2, (70, 16, 16)).astype(np.float32)
    profile = {'driver': 'GTiff', 'count': 70, 'height': 16, 'width': 16, 'dtype': 'float32'}
    transform = from_origin(500000, 4600000, 10, 10)
    with rasterio.open(
        tmp_path / 'a.tif', 'w', **profile, crs='EPSG:32631', transform=transform
    ) as dst:
        dst.write(image)
    (tmp_path / 't.csv').write_text('path,sensor,datetime,place\na.tif,hyper,2018-01-01,p\n')
    with kept_registry():
        register_sensors({'hyper': definition}, 'test')
        archive = RasterArchive(tmp_path / 't.csv', ['hyper'])
        assert np.array_equal(archive[0]['image'].numpy(), image)
