"""Real archives, read through a layout of a few lines; skipped where they are absent.

References are rasterio's and Pillow's pixels.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from rasterio.windows import Window

from geofm.datasets import RasterArchive
from geofm.datasets.table.indexing import index_folder
from geofm.datasets.table.layout import Layout
from geofm.sensors import load_sensors, sensor_channels
from tests.registry import kept_registry

DATA = Path(__file__).resolve().parents[4] / 'shared' / 'data'
REAL = DATA / 'real'

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f'{REAL} is not there')


def archive(
    root: Path, tmp_path: Path, files: list[dict[str, Any]], sensors: list[str], **kwargs: Any
) -> RasterArchive:
    """Open all samples of an archive by a layout."""
    layout = tmp_path / 'layout.yaml'
    layout.write_text(yaml.safe_dump({'files': files}))
    # Opening scans the files.
    table = index_folder(root, Layout.read(layout)).table
    return RasterArchive(table, sensors, split='all', **kwargs)


def window_of(ds: RasterArchive, i: int) -> Window:
    _, _, extent = ds.matches.scene(i)
    return Window(extent.col, extent.row, extent.width, extent.height)


def pixels_of(path: Path | str, window: Window | None = None) -> torch.Tensor:
    with rasterio.open(path) as src:
        return torch.from_numpy(src.read(window=window).astype(np.float32))


def test_sen1floods11(tmp_path: Path) -> None:
    files = [
        {'sensor': 's1', 'regex': r'(?P<place>\w+)_S1Hand\.tif', 'date': '2019-09-17'},
        {'sensor': 's2', 'regex': r'(?P<place>\w+)_S2Hand\.tif', 'date': '2019-09-18'},
    ]
    root = REAL / 'sen1floods11_sample'
    ds = archive(root, tmp_path, files, ['s1', 's2'], window_size=200)
    assert len(ds) == 9
    for i in range(9):
        sample, window = ds[i], window_of(ds, i)
        assert torch.equal(sample['image'][:2], pixels_of(ds.files_of(i)[0], window))
        assert torch.equal(sample['image'][2:], pixels_of(ds.files_of(i)[1], window))
        assert (np.diff(sample['dates'].numpy()) == 1).all()


def test_terramind(tmp_path: Path) -> None:
    folders = {'s1': 'S1RTC', 's2l2a': 'S2L2A', 'dem': 'DEM'}
    files = [
        {'sensor': key, 'regex': rf'{folder}/(?P<place>\w+)\.tif'}
        for key, folder in folders.items()
    ]
    root, sensors = REAL / 'terramind_examples', list(folders)
    kwargs: dict[str, Any] = {'reference': 's1', 'allow_missing': ['s2l2a'], 'window_size': 100}
    ds = archive(root, tmp_path, files, sensors, **kwargs)
    assert len(ds) == 9 * len(list((root / 'S1RTC').glob('*.tif'))) > 0
    seen = set()
    for i in range(len(ds)):
        sample, window, place = ds[i], window_of(ds, i), ds.index['place'].iloc[i]
        for key, folder in folders.items():
            path = root / folder / f'{place}.tif'
            there = bool(sample['present'][sensors.index(key)])
            assert there == path.is_file()
            part = sample['image'][sensor_channels(ds.bands)[key]]
            assert torch.equal(part, pixels_of(path, window) if there else part * 0)
            seen.add((key, there))
    assert len(seen) == 4


def test_bigearthnet(tmp_path: Path) -> None:
    files = [
        {
            'sensor': 's2l2a',
            'regex': r'.*/S2._MSIL2A_(?P<date>\d{8})T\d+_(?P<place>\d+_\d+)_(?P<band>B\w\w)\.tif',
        },
        {
            'sensor': 's1',
            'regex': r'.*/S1.*_(?P<date>\d{8})T\d+_\w{5}_(?P<place>\d+_\d+)_(?P<band>V[VH])\.tif',
        },
    ]
    root = REAL / 'bigearthnet_example'
    ds = archive(root, tmp_path, files, ['s1', 's2l2a'], max_day_gap=30)
    assert len(ds) >= 2
    compared = 0
    for i in range(len(ds)):
        sample, paths = ds[i], ds.files_of(i)
        assert sample['image'].shape[1:] == (120, 120)
        assert len(paths) == 14
        for path in paths:
            name = re.search(r'_([BV]\w+)\.tif', path.name)[1]  # type: ignore[index]
            key = name if name.startswith('V') else f's2l2a.{name}'
            pixels = pixels_of(path)[0]
            if pixels.shape == (120, 120):
                assert torch.equal(sample['image'][ds.bands.index(key)], pixels)
                compared += 1
    # VV, VH and the four bands with pixels of 10 m.
    assert compared == 6 * len(ds)


def test_worldcereal(tmp_path: Path) -> None:
    files: list[dict[str, Any]] = [
        {
            'sensor': 's1',
            'regex': r'(?P<place>\w+)/S1_GRD-ASCENDING_20m_.*\.nc',
            'time': 'timestamp',
            'scale': 1e-4,
        },
        {
            'sensor': 's2l2a',
            'regex': r'(?P<place>\w+)/S2_L2A_10m_.*\.nc',
            'time': 'timestamp',
        },
    ]
    root = REAL / 'worldcereal_series'
    ds = archive(
        root,
        tmp_path,
        files,
        ['s1', 's2l2a'],
        bands=['VV', 'VH', 's2l2a.B02', 's2l2a.B03', 's2l2a.B04', 's2l2a.B08'],
        max_day_gap=3,
    )
    assert len(ds) > 50
    rng = np.random.default_rng(0)
    for i in rng.choice(len(ds), 8, replace=False).tolist():
        sample = ds[i]
        address = next(str(path) for path in ds.files_of(i) if 'S2_L2A' in str(path))
        rows = ds.matches.rows_of(i, 's2l2a')
        assert rows is not None
        time = np.datetime64(int(ds.table.time[rows[0]]), 'us')
        assert sample['dates'][1] == time.astype('datetime64[D]').astype(int)
        for n, band in enumerate(ds.bands[2:], 2):
            # The address in the table has the file and the variable.
            file = re.search(r'[^":]+\.nc', address)
            assert file is not None
            # GDAL finds no geotransform in these files and flips them vertically.
            with h5py.File(file[0]) as content:
                assert (np.diff(content['y'][:]) == -10).all()
                unit = content['timestamp'].attrs['units'].split(' since ')[1]
                start = np.datetime64(unit.replace(' ', 'T'))
                times = (start + content['timestamp'][:].astype('timedelta64[s]')).tolist()
                number = times.index(time.astype('datetime64[s]').item())
                want = content[band.removeprefix('s2l2a.')][number].astype(np.float32)
            # Fill is 0. Values of invalid pixels are not compared.
            valid = sample['valid'].numpy()
            assert (sample['image'][n].numpy()[valid] == want[valid]).all()


def test_ombria(tmp_path: Path) -> None:
    zipped = DATA / 'ombria' / 'ombria.zip'
    if not zipped.is_file():
        pytest.skip(f'{zipped} is not there')
    (tmp_path / 'tiles').mkdir()
    with zipfile.ZipFile(zipped) as source:
        names = [name for name in source.namelist() if re.search(r'/after/00[01]\d\.png', name)]
        source.extractall(tmp_path / 'tiles', names)
        picture = {
            name: np.array(Image.open(io.BytesIO(source.read(name))), np.float32) for name in names
        }
    band = {'mean': 100, 'std': 50}
    sensors = {
        'sar8': {'title': 'SAR', 'quantity': 'image', 'unit': 'grey value'},
        'opt8': {'title': 'Optical', 'quantity': 'image', 'unit': 'grey value'},
    }
    sensors['sar8']['bands'] = [{'name': 'grey', **band}]  # type: ignore[assignment]
    sensors['opt8']['bands'] = [{'name': n, **band} for n in ('a', 'b', 'c')]  # type: ignore[assignment]
    (tmp_path / 'sensors.yaml').write_text(yaml.safe_dump(sensors, sort_keys=False))
    files = [
        {'sensor': 'sar8', 'regex': r's1/after/(?P<place>\d+)\.png'},
        {'sensor': 'opt8', 'regex': r's2/after/(?P<place>\d+)\.png'},
    ]
    with kept_registry():
        load_sensors(tmp_path / 'sensors.yaml')
        ds = archive(tmp_path / 'tiles', tmp_path, files, ['sar8', 'opt8'], window_size=100)
        assert len(ds) == 9 * len([name for name in names if name.startswith('s1')])
        for i in range(0, len(ds), 5):
            sample, window = ds[i], window_of(ds, i)
            rows, cols = window.toslices()
            sar, optical = (path.relative_to(tmp_path / 'tiles') for path in ds.files_of(i))
            assert sar.name == optical.name
            assert torch.equal(sample['image'][0], torch.from_numpy(picture[str(sar)][rows, cols]))
            want = torch.from_numpy(picture[str(optical)][rows, cols]).permute(2, 0, 1)
            assert torch.equal(sample['image'][1:], want)
            assert 'crs' not in sample
