from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.windows import Window

from geofm.datasets.pairs.reading import BrokenFileError
from geofm.datasets.table import Observations, RasterTable, read_observation
from geofm.grid import Grid
from tests.datasets.table.rasters import dn, write_csv, write_raster

S2 = [f'B{i:02d}' for i in range(1, 9)] + ['B8A', 'B09', 'B10', 'B11', 'B12']


def one(tmp_path: Path, **columns: Any) -> RasterTable:
    row = {'path': 'a.tif', 'sensor': 's2', 'datetime': '2018-01-01', **columns}
    return RasterTable.read(write_csv(tmp_path / 't.csv', [row]))


def test_a_whole_file_and_a_window_are_its_pixels(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'a.tif', dn((13, 20, 30)))
    table = one(tmp_path)
    values, valid = read_observation(table, [0])
    assert np.array_equal(values, pixels)
    assert valid.all()
    values, valid = read_observation(table, [0], ['B12', 'B01'], window=Window(5, 3, 8, 4))
    assert np.array_equal(values, pixels[[12, 0], 3:7, 5:13])
    assert values.dtype == np.float32


def test_outside_the_file_nothing_is_valid(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'a.tif', dn((13, 20, 30)))
    values, valid = read_observation(one(tmp_path), [0], window=Window(-2, 15, 10, 10))
    inside = np.zeros((10, 10), bool)
    inside[:5, 2:] = True
    assert np.array_equal(valid, inside)
    assert np.array_equal(values[:, :5, 2:], pixels[:, 15:, :8])
    _, valid = read_observation(one(tmp_path), [0], window=Window(100, 100, 4, 4))
    assert not valid.any()


def test_bands_are_found_by_their_names(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'a.tif', dn((3, 4, 4)), descriptions=['B4', 'qa', 'B02'])
    values, _ = read_observation(one(tmp_path), [0], ['B02', 'B04'])
    assert np.array_equal(values, pixels[[2, 0]])


def test_the_table_says_which_band_is_which(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'a.tif', dn((3, 4, 4)), descriptions=['B4', 'qa', 'B02'])
    values, _ = read_observation(one(tmp_path, band='B08 - B03'), [0], ['B03', 'B08'])
    assert np.array_equal(values, pixels[[2, 0]])
    values, _ = read_observation(one(tmp_path, band='B08', index=2), [0], ['B08'])
    assert np.array_equal(values, pixels[[1]])
    with pytest.raises(BrokenFileError, match=r"a\.tif: cannot be read \(bands \['B01'\] are "):
        read_observation(one(tmp_path, band='B08 - B03'), [0], ['B03', 'B01'])
    with pytest.raises(BrokenFileError, match='3 bands, but the table names 2'):
        read_observation(one(tmp_path, band='B08 B03'), [0], ['B03'])
    with pytest.raises(BrokenFileError, match='3 bands, but the table has index 4'):
        read_observation(one(tmp_path, band='B08', index=4), [0], ['B08'])


def test_scale_offset_unit_and_nodata_of_the_table_take_precedence(tmp_path: Path) -> None:
    numbers = dn((1, 4, 4))
    numbers[0, 0, 0] = 7
    write_raster(tmp_path / 'a.tif', numbers, nodata=9999)
    table = one(tmp_path, band='B02', scale=1e-4, offset=-0.1, nodata=7)
    values, valid = read_observation(table, [0], ['B02'])
    assert np.allclose(values, numbers - 1000.0, atol=1e-3)
    assert valid.sum() == 15
    assert not valid[0, 0]
    power = np.array([[[0.1, 1.0, 10.0]]], np.float32)
    write_raster(tmp_path / 'a.tif', power)
    table = one(tmp_path, sensor='s1', band='VV', unit='linear power')
    values, _ = read_observation(table, [0], ['VV'])
    assert np.allclose(values, [[[-10, 0, 10]]])


def test_one_file_per_band_at_several_resolutions(tmp_path: Path) -> None:
    fine, coarse = dn((1, 12, 12)), dn((1, 6, 6), seed=1)
    write_raster(tmp_path / 'B02.tif', fine)
    write_raster(tmp_path / 'B03.tif', fine + 1)
    write_raster(tmp_path / 'B05.tif', coarse, transform=from_origin(500_000, 5_000_000, 20, 20))
    rows = [
        {'path': f'{b}.tif', 'sensor': 's2', 'datetime': '2018-01-01', 'place': 'p', 'band': b}
        for b in ('B05', 'B02', 'B03')
    ]
    table = RasterTable.read(write_csv(tmp_path / 't.csv', rows))
    observation = Observations.of(table).rows(0)
    values, valid = read_observation(table, observation, ['B02', 'B05', 'B03'])
    assert np.array_equal(values[[0, 2]], np.concatenate([fine, fine + 1]))
    assert valid.all()
    with rasterio.open(tmp_path / 'B05.tif') as src:
        expected = np.empty((12, 12), np.float32)
        rasterio.warp.reproject(
            src.read(1).astype(np.float32),
            expected,
            src_transform=src.transform,
            src_crs=src.crs,
            dst_transform=from_origin(500_000, 5_000_000, 10, 10),
            dst_crs=src.crs,
            resampling=Resampling.bilinear,
        )
    assert np.allclose(values[1], expected)
    part, _ = read_observation(table, observation, ['B05'], window=Window(2, 2, 2, 2))
    assert part.shape == (1, 2, 2)


def test_zero_in_one_of_several_files_is_a_measurement(tmp_path: Path) -> None:
    one_band, other = dn((1, 4, 4)), dn((1, 4, 4), seed=1)
    one_band[0, 0, :2] = other[0, 0, 1:3] = 0
    write_raster(tmp_path / 'B02.tif', one_band)
    write_raster(tmp_path / 'B03.tif', other)
    rows = [
        {'path': f'{b}.tif', 'sensor': 's2', 'datetime': '2018-01-01', 'place': 'p', 'band': b}
        for b in ('B02', 'B03')
    ]
    table = RasterTable.read(write_csv(tmp_path / 't.csv', rows))
    _, valid = read_observation(table, [0, 1], ['B02', 'B03'])
    assert np.argwhere(~valid).tolist() == [[0, 1]]


def test_another_grid_is_warped_by_the_method_of_the_sensor(tmp_path: Path) -> None:
    x = np.arange(1, 41, dtype=np.float32)
    ramp = np.broadcast_to(-x, (2, 40, 40))
    write_raster(tmp_path / 'a.tif', np.ascontiguousarray(ramp))
    table = one(tmp_path, sensor='s1')
    with rasterio.open(tmp_path / 'a.tif') as src:
        own = Grid.of(src)
    target = Grid(own.crs, from_origin(500_105, 4_999_895, 10, 10), 8, 8)
    values, valid = read_observation(table, [0], grid=target)
    # Half a pixel to the right of pixel centres, the value is the mean of two neighbours.
    assert np.allclose(values[0], -(np.arange(11, 19) + 0.5))
    assert valid.all()
    beyond = Grid(own.crs, from_origin(499_955, 5_000_000, 10, 10), 4, 12)
    assert not read_observation(table, [0], grid=beyond)[1][:, :4].any()


def test_without_crs_the_pixels_are_the_grid(tmp_path: Path) -> None:
    pixels = write_raster(tmp_path / 'a.tif', dn((13, 6, 6)), crs=None)
    table = one(tmp_path)
    values, _ = read_observation(table, [0], window=Window(1, 2, 3, 4))
    assert np.array_equal(values, pixels[:, 2:6, 1:4])
    grid = Grid(rasterio.CRS.from_epsg(32631), from_origin(0, 0, 10, 10), 4, 4)
    with pytest.raises(BrokenFileError, match='no CRS'):
        read_observation(table, [0], grid=grid)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    table = one(tmp_path)
    with pytest.raises(BrokenFileError, match=r'a\.tif: no such file'):
        read_observation(table, [0])
    (tmp_path / 'a.tif').write_bytes(b'II*\0')
    with pytest.raises(BrokenFileError, match=r'a\.tif: cannot be read'):
        read_observation(table, [0])


def test_real_files_are_read_as_rasterio_reads_them(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / 'real'
    files = [
        *((f, 's1') for f in sorted((folder / 'terramind_examples' / 'S1RTC').glob('*.tif'))),
        (folder / 'sen1floods11_sample' / 'Spain_7370579_S2Hand.tif', 's2'),
        (folder / 'sen1floods11_sample' / 'Spain_7370579_S1Hand.tif', 's1'),
    ]
    rows = [{'path': f, 'sensor': s, 'datetime': '', 'place': f.name} for f, s in files]
    table = RasterTable.read(write_csv(tmp_path / 't.csv', rows))
    for row, (file, _) in enumerate(files):
        with rasterio.open(file) as src:
            expected = src.read(window=Window(100, 50, 64, 96)).astype(np.float32)
        values, valid = read_observation(table, [row], window=Window(100, 50, 64, 96))
        assert np.array_equal(values[:, valid], expected[:, valid])
        assert valid.any()
