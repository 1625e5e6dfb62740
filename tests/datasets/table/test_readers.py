import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
import zarr
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import from_origin
from rasterio.windows import Window

from geofm.datasets.pairs.reading import BrokenFileError
from geofm.datasets.readers.safe import read_product
from geofm.datasets.table import Observations, RasterTable, open_table, read_observation
from geofm.datasets.table.indexing import index_folder
from geofm.datasets.table.layout import Files, Layout
from geofm.datasets.table.scanning import scan_table
from geofm.sensors import SENSORS
from tests.datasets.table.rasters import dn, write_csv, write_raster

WINDOW = Window(2, 3, 4, 5)


def read(tmp_path: Path, path: str, sensor: str = 's2', **columns: Any) -> Any:
    row = {'path': path, 'sensor': sensor, 'datetime': '', 'place': 'p', **columns}
    file = tmp_path / 't.csv'
    names = ','.join(row)
    quoted = ','.join('"' + str(v).replace('"', '""') + '"' for v in row.values())
    file.write_text(f'{names}\n{quoted}\n')
    table = open_table(file)
    assert table.problem.tolist() == [-1]
    bands = [name for name in table.bands_of(0) or () if name != '-'] or None
    return table, *read_observation(table, [0], bands, window=WINDOW)


@pytest.mark.parametrize('last', [False, True])
def test_npy_files_are_read_as_they_are(tmp_path: Path, last: bool) -> None:
    pixels = dn((13, 12, 9))
    np.save(tmp_path / 'a.npy', np.moveaxis(pixels, 0, -1) if last else pixels)
    table, values, valid = read(tmp_path, 'a.npy')
    assert table.grid(0) is None
    assert np.array_equal(values, pixels[:, 3:8, 2:6])
    assert valid.all()


def test_npy_files_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / 'a.npy', np.array([{}], object), allow_pickle=True)
    row = {'path': 'a.npy', 'sensor': 's2', 'datetime': '', 'place': 'p'}
    table = RasterTable.read(write_csv(tmp_path / 't.csv', [row]))
    with pytest.raises(BrokenFileError, match=r'a\.npy: cannot be read \('):
        read_observation(table, [0])


def test_hdf5_has_an_array_of_each_sensor(tmp_path: Path) -> None:
    s2, s1 = dn((13, 12, 9)), -dn((2, 12, 9)).astype(np.float32) / 500
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['S2'], file['s1'] = s2, s1
    _, values, _ = read(tmp_path, 'a.h5')
    assert np.array_equal(values, s2[:, 3:8, 2:6])
    _, values, _ = read(tmp_path, 'a.h5', 's1')
    assert np.array_equal(values, s1[:, 3:8, 2:6])
    _, values, _ = read(tmp_path, f'HDF5:"{tmp_path}/a.h5"://S2')
    assert np.array_equal(values, s2[:, 3:8, 2:6])


@pytest.mark.parametrize('zipped', [False, True])
def test_zarr_stores_are_georeferenced_by_their_coordinates(tmp_path: Path, zipped: bool) -> None:
    pixels = dn((3, 2, 13, 12, 9))
    name = 'a.zarr.zip' if zipped else 'a.zarr'
    path = tmp_path / name
    store: Any = zarr.storage.ZipStore(path, mode='w') if zipped else path
    group = zarr.create_group(store)
    group.create_array('bands', data=pixels, chunks=(1, 1, 13, 12, 9))
    names = np.array(SENSORS['s2'].short_names)
    group.create_array('band', data=names)
    x = 500_005 + 10 * np.arange(9.0) + 1000 * np.arange(3)[:, None]
    group.create_array('x', data=x)
    group.create_array('y', data=np.broadcast_to(4e6 - 10 * np.arange(12.0), (3, 12)).copy())
    group.create_array('crs', data=np.full(3, 32631))
    if zipped:
        store.close()
    table, values, valid = read(tmp_path, f'ZARR:"{name}":/bands:2:1')
    assert np.array_equal(values, pixels[2, 1, :, 3:8, 2:6])
    assert valid.all()
    grid = table.grid(0)
    assert grid.crs == CRS.from_epsg(32631)
    assert grid.transform == from_origin(502_000, 4_000_005, 10, 10)


def test_a_zarr_store_may_be_one_image(tmp_path: Path) -> None:
    pixels = dn((13, 12, 9))
    zarr.create_group(tmp_path / 'a.zarr').create_array('s2', data=pixels)
    _, values, _ = read(tmp_path, 'a.zarr')
    assert np.array_equal(values, pixels[:, 3:8, 2:6])


@pytest.mark.parametrize('name', ['a.TIF', 'b.tiff', 'c.JPG'])
def test_suffixes_are_case_insensitive(tmp_path: Path, name: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(1, 255, (3, 12, 9)).astype(np.uint8)
    if name.endswith('JPG'):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / name, 'JPEG')
        pixels = np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1)
    else:
        write_raster(tmp_path / name, pixels)
    _, values, _ = read(tmp_path, name, 'rgb')
    assert np.array_equal(values, pixels[:, 3:8, 2:6])


METADATA = """<n1:Level-2A_User_Product xmlns:n1="https://example.org/PSD"><n1:General_Info>
<PRODUCT_START_TIME>2023-06-01T10:05:59.024Z</PRODUCT_START_TIME>
<BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>
<BOA_ADD_OFFSET_VALUES_LIST>{}</BOA_ADD_OFFSET_VALUES_LIST>
</n1:General_Info></n1:Level-2A_User_Product>"""


@pytest.mark.parametrize('zipped', [False, True])
def test_a_product_of_sentinel2_is_one_observation(tmp_path: Path, zipped: bool) -> None:
    name = 'S2B_MSIL2A_20230601T100559_N0509_R022_T33UUP_20230601T132522'
    root = tmp_path / 'data' / f'{name}.SAFE'
    folder = root / 'GRANULE' / 'L2A_T33UUP_A032567' / 'IMG_DATA'
    fine, coarse = 1000 + dn((1, 12, 12)), 1000 + dn((1, 6, 6))
    place = from_origin(500_000, 5_000_000, 20, 20)
    write_raster(folder / 'R10m' / 'T33UUP_20230601T100559_B02_10m.tif', fine)
    write_raster(folder / 'R20m' / 'T33UUP_20230601T100559_B02_20m.tif', coarse, transform=place)
    write_raster(folder / 'R20m' / 'T33UUP_20230601T100559_B05_20m.tif', coarse, transform=place)
    write_raster(folder / 'R20m' / 'T33UUP_20230601T100559_SCL_20m.tif', coarse, transform=place)
    offsets = ''.join(f'<BOA_ADD_OFFSET band_id="{i}">-1000</BOA_ADD_OFFSET>' for i in range(13))
    (root / 'MTD_MSIL2A.xml').write_text(METADATA.format(offsets))
    if zipped:
        files = [f for f in root.rglob('*') if f.is_file()]
        with zipfile.ZipFile(tmp_path / 'data' / f'{name}.zip', 'w') as archive:
            for file in files:
                archive.write(file, file.relative_to(tmp_path / 'data'))
        for file in files:
            file.unlink()
    layout = Layout((Files('s2l2a', r'S2\w_MSIL2A_.*\.(SAFE|zip)'),))
    (tmp_path / 'data' / f'{name}.SAFE').rename(tmp_path / 'gone') if zipped else None
    table = scan_table(index_folder(tmp_path / 'data', layout).table).table
    observations = Observations.of(table)
    assert len(observations) == 1
    when = np.datetime64(int(observations.time[0]), 'us')
    assert str(when.astype('datetime64[s]')) == '2023-06-01T10:05:59'
    bands = ['s2l2a.B02', 's2l2a.B05']
    values, valid = read_observation(table, observations.rows(0), bands)
    assert np.array_equal(values[0], fine[0] - 1000.0)
    assert np.isclose(values[1].mean(), coarse.mean() - 1000, rtol=0.05)
    assert valid.all()


def test_a_product_without_bands_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'x.SAFE').mkdir()
    with pytest.raises(ValueError, match=r'x\.SAFE: no file of a band of Sentinel-2'):
        read_product(tmp_path / 'x.SAFE', SENSORS['s2'])


def test_ground_control_points_place_a_raster(tmp_path: Path) -> None:
    pixels = np.full((2, 40, 60), -12, np.float32)
    pixels[:, :20] = -7
    points = [
        GroundControlPoint(row, col, 5 + col * 0.001, 50 - row * 0.001)
        for row in (0, 20, 40)
        for col in (0, 30, 60)
    ]
    path = tmp_path / 'a.tiff'
    options = {'count': 2, 'height': 40, 'width': 60, 'dtype': 'float32'}
    with rasterio.open(path, 'w', driver='GTiff', **options) as dst:
        dst.write(pixels)
        dst.gcps = points, CRS.from_epsg(4326)
    row = {'path': 'a.tiff', 'sensor': 's1', 'datetime': '', 'place': 'p'}
    table = open_table(write_csv(tmp_path / 't.csv', [row]))
    assert np.allclose(table.bounds[0], [5, 49.96, 5.06, 50], atol=2e-3)
    values, valid = read_observation(table, [0])
    assert valid.mean() > 0.9
    middle = values.shape[1] // 2
    assert np.allclose(values[:, 2 : middle - 2, 2:-2], -7)
    assert np.allclose(values[:, middle + 2 : -2, 2:-2], -12)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a server of the files of a folder that fails twice at first."""
    (tmp_path / 'www').mkdir()
    script = Path(__file__).with_name('range_server.py')
    command = [sys.executable, str(script), str(tmp_path / 'www'), '2']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f'http://127.0.0.1:{process.stdout.readline().strip()}'
        process.terminate()


def test_remote_files_are_read_in_part_and_retried(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('GDAL_HTTP_RETRY_DELAY', '0.05')
    options: dict[str, Any] = {
        'tiled': True,
        'blockxsize': 64,
        'blockysize': 64,
        'interleave': 'band',
    }
    pixels = write_raster(tmp_path / 'www' / 'a.tif', dn((13, 512, 512)), **options)
    size = (tmp_path / 'www' / 'a.tif').stat().st_size
    row = {'path': f'{server}/a.tif', 'sensor': 's2', 'datetime': '', 'place': 'p'}
    table = open_table(write_csv(tmp_path / 't.csv', [row]))
    assert table.height.tolist() == [512]
    values, valid = read_observation(table, [0], ['B04'], window=Window(70, 130, 40, 50))
    assert np.array_equal(values, pixels[3:4, 130:180, 70:110])
    assert valid.all()
    with urllib.request.urlopen(f'{server}/sent') as answer:
        assert 0 < int(answer.read()) < size / 4


def test_a_missing_remote_file_is_named(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('GDAL_HTTP_RETRY_DELAY', '0.05')
    row = {'path': f'{server}/b.tif', 'sensor': 's2', 'datetime': '', 'place': 'p'}
    scan = scan_table(RasterTable.read(write_csv(tmp_path / 't.csv', [row])))
    (message,) = scan.messages.values()
    assert f'{server}/b.tif: cannot be read from the server' in message
    with pytest.raises(BrokenFileError, match=r'b\.tif: cannot be read'):
        read_observation(scan.table, [0])
