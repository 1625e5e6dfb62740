from pathlib import Path

import numpy as np
import pytest
from pyproj import Transformer
from rasterio.transform import from_origin

from geofm.datasets.table import RasterTable, TableError, open_table, scan_table
from geofm.datasets.table.scanning import count_problems
from tests.datasets.table.rasters import dn, write_csv, write_raster


def db(shape: tuple[int, ...]) -> np.ndarray:
    return -np.random.default_rng(0).uniform(5, 20, shape).astype(np.float32)


def test_grids_and_bounds_are_those_of_the_files(tmp_path: Path) -> None:
    write_raster(tmp_path / 'a.tif', dn((13, 20, 30)))
    write_raster(tmp_path / 'b.tif', db((2, 4, 6)), crs=None)
    rows = [
        {'path': 'a.tif', 'sensor': 's2', 'datetime': '2018-01-01', 'place': 'p'},
        {'path': 'b.tif', 'sensor': 's1', 'datetime': '2018-01-01', 'place': 'q'},
    ]
    table = scan_table(RasterTable.read(write_csv(tmp_path / 't.csv', rows))).table
    assert table.is_scanned
    assert table.epsg.tolist() == [32631, -1]
    assert table.height.tolist() == [20, 4]
    assert table.width.tolist() == [30, 6]
    assert table.transform[0].tolist() == [10, 0, 500_000, 0, -10, 5_000_000]
    assert np.isnan(table.bounds[1]).all()
    to_lonlat = Transformer.from_crs(32631, 4326, always_xy=True)
    corners = [
        to_lonlat.transform(x, y) for x in (500_000, 500_300) for y in (5_000_000, 4_999_800)
    ]
    xs, ys = zip(*corners, strict=True)
    assert np.allclose(table.bounds[0], [min(xs), min(ys), max(xs), max(ys)])
    table.write(tmp_path / 'u.parquet')
    assert open_table(tmp_path / 'u.parquet').grid(0) == table.grid(0)


def test_problems_of_files_are_counted_and_not_raised(tmp_path: Path) -> None:
    write_raster(tmp_path / 'good.tif', dn((13, 8, 8)))
    write_raster(tmp_path / 'few.tif', dn((4, 8, 8)))
    write_raster(tmp_path / 'zeros.tif', np.zeros((13, 8, 8), np.uint16))
    write_raster(tmp_path / 'reflectance.tif', dn((13, 8, 8)).astype(np.float32) / 1e4)
    write_raster(tmp_path / 'engineering.tif', dn((13, 8, 8)), crs='LOCAL_CS["x",UNIT["m",1]]')
    (tmp_path / 'broken.tif').write_bytes(b'II*\0abc')
    files = sorted(f.name for f in tmp_path.glob('*.tif'))
    rows = [{'path': f, 'sensor': 's2', 'datetime': '', 'place': f} for f in [*files, 'gone.tif']]
    scan = scan_table(RasterTable.read(write_csv(tmp_path / 't.csv', rows)))
    assert scan.unnamed == {'s2': (1, str(tmp_path / 'good.tif'))}
    assert set(scan.messages) == {problem for problem, _, _ in count_problems(scan.table)}
    names = {Path(p).name: k for k, n, p in count_problems(scan.table) if n == 1}
    assert names == {
        'few.tif': 'bands are not those of the sensor or the table',
        'zeros.tif': 'every pixel is 0',
        'reflectance.tif': 'S2 in reflectance, not in DN (reflectance x 10,000)',
        'engineering.tif': 'no CRS with an EPSG code',
        'broken.tif': 'not readable as a raster',
        'gone.tif': 'no such file',
    }
    assert (scan.table.problem < 0).sum() == 1


def test_a_missing_file_is_an_error_of_a_new_table(tmp_path: Path) -> None:
    write_raster(tmp_path / 'a.tif', dn((13, 8, 8)))
    rows = [{'path': f, 'sensor': 's2', 'datetime': '', 'place': f} for f in ('a.tif', 'b.tif')]
    file = write_csv(tmp_path / 't.csv', rows)
    with pytest.raises(TableError, match=r't\.csv, row 2: no such file: .*b\.tif .*remove the row'):
        open_table(file)
    scan_table(RasterTable.read(file)).table.write(tmp_path / 'u.csv')
    assert (open_table(tmp_path / 'u.csv').problem >= 0).sum() == 1


def test_files_of_several_sensors_need_a_place_or_ground(tmp_path: Path) -> None:
    write_raster(tmp_path / 'a.tif', dn((13, 8, 8)))
    write_raster(tmp_path / 'b.tif', db((2, 8, 8)), crs=None)
    rows = [
        {'path': 'a.tif', 'sensor': 's2', 'datetime': '', 'place': ''},
        {'path': 'b.tif', 'sensor': 's1', 'datetime': '', 'place': ''},
    ]
    with pytest.raises(TableError, match='row 2: has no CRS and no place'):
        open_table(write_csv(tmp_path / 't.csv', rows))
    rows = [{**row, 'place': 'p'} for row in rows]
    with pytest.raises(TableError, match='row 2: has no CRS, but other files of place p have one'):
        open_table(write_csv(tmp_path / 't.csv', rows))


def test_one_dark_band_of_several_is_accepted(tmp_path: Path) -> None:
    write_raster(tmp_path / 'B10.tif', np.ones((1, 8, 8), np.uint16))
    write_raster(tmp_path / 'B12.tif', np.zeros((1, 8, 8), np.uint16))
    rows = [
        {'path': f'{b}.tif', 'sensor': 's2', 'datetime': '', 'place': 'p', 'band': b}
        for b in ('B10', 'B12')
    ]
    assert (open_table(write_csv(tmp_path / 't.csv', rows)).problem < 0).all()


def test_rows_of_one_file_are_scanned_together(tmp_path: Path) -> None:
    write_raster(tmp_path / 'a.tif', dn((2, 8, 8)), transform=from_origin(0, 0, 1, 1))
    rows = [
        {'path': 'a.tif', 'sensor': 's2', 'datetime': '', 'place': 'p', 'band': b, 'index': i}
        for i, b in enumerate(('B02', 'B03'), 1)
    ]
    table = open_table(write_csv(tmp_path / 't.csv', rows))
    assert table.height.tolist() == [8, 8]
