import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from datetime import date
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from torchgeo.datasets import DatasetNotFoundError

from geofm.datasets import SEN12MSCRTS, EmptySplitError
from geofm.datasets.catalogue import catalogue, scan
from geofm.datasets.catalogue.catalogue import (
    CATALOGUE_NAME,
    Catalogue,
    beside,
    find_catalogue,
    in_cache,
    read_state,
    update_catalogue,
)
from geofm.datasets.catalogue.columns import AFFINE
from geofm.datasets.catalogue.inspection import inspect
from geofm.models.dates import NO_DATE
from geofm.sen12ms import PairKey, SceneName
from geofm.sensors import SENTINEL1, SENTINEL2, BandError
from tests.datasets.tree import grid_at, scene_path, write_pair, write_scene

KEY = PairKey('ROIs1868', 36, 0, 0)
GRID = grid_at(32632, 500000, 5300000)


@pytest.fixture
def own_tree(tree: Path, tmp_path: Path) -> Path:
    # Other tests may have written a catalogue to the shared tree.
    ignore = shutil.ignore_patterns(CATALOGUE_NAME)
    return Path(shutil.copytree(tree, tmp_path / 'crts', ignore=ignore))


def write_dates(root: Path) -> None:
    """S1 on days 1, 11, 21 of January; S2 on days 9, 12, 30."""
    for step, (s1, s2) in enumerate(((1, 9), (11, 12), (21, 30))):
        key = KEY._replace(time_step=step)
        write_pair(root, key, GRID, date(2018, 1, s1), date(2018, 1, s2))


def test_rows_agree_with_rasterio_and_the_names(own_tree: Path) -> None:
    table = update_catalogue(own_tree).table
    assert table['path'].tolist() == sorted(
        str(path.relative_to(own_tree)) for path in own_tree.rglob('*.tif')
    )
    row: Any
    for row in table.itertuples():
        path = own_tree / row.path
        name = SceneName.parse(path)
        assert name is not None
        key = PairKey(row.season, row.roi, row.patch, row.time_step)
        assert (name.sensor, name.key, name.date) == (row.sensor, key, row.date.date())
        assert (row.size, row.mtime) == (path.stat().st_size, path.stat().st_mtime_ns)
        with rasterio.open(path) as src:
            assert row.epsg == src.crs.to_epsg()
            assert tuple(getattr(row, axis) for axis in AFFINE) == tuple(src.transform)[:6]
            assert (row.width, row.height, row.bands) == (src.width, src.height, src.count)
            assert row.dtype == src.dtypes[0]
    assert table['problem'].isna().all()


def test_the_file_is_geoparquet(own_tree: Path) -> None:
    stored = gpd.read_parquet(update_catalogue(own_tree).file)
    assert stored.crs.to_epsg() == 4326
    pairs = SEN12MSCRTS(own_tree, 'all').index
    shapes = stored[stored['sensor'] == 's2'].set_index('path').geometry
    for path, shape in zip(pairs['s2'], pairs.geometry, strict=True):
        assert shapes[str(Path(path).relative_to(own_tree))].equals(shape)


def test_files_of_a_large_tree_are_not_opened(
    own_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SEN12MSCRTS(own_tree, 'all')
    monkeypatch.setattr(catalogue, 'SMALL', 0)
    monkeypatch.setattr(rasterio, 'open', None)
    monkeypatch.setattr(scan, 'inspect', None)
    large = SEN12MSCRTS(own_tree, 'all')
    assert len(large) == 11
    pd.testing.assert_frame_equal(pd.DataFrame(small.index), pd.DataFrame(large.index))


def test_only_new_and_changed_files_are_read(
    own_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    really = inspect

    def noting(path: str, sensor: str) -> object:
        read.append(str(Path(path).relative_to(own_tree)))
        return really(path, sensor)

    monkeypatch.setattr(scan, 'inspect', noting)
    first = update_catalogue(own_tree)
    assert sorted(read) == first.table['path'].tolist()
    read.clear()
    content = first.file.read_bytes()
    update_catalogue(own_tree)
    assert read == []
    assert first.file.read_bytes() == content
    gone, changed = first.table['path'][[0, 3]]
    (own_tree / gone).unlink()
    os.utime(own_tree / changed, ns=(1, 1))
    new = write_scene(own_tree, 's1', KEY._replace(patch=99), GRID, date(2018, 1, 1))
    table = update_catalogue(own_tree).table
    assert sorted(read) == sorted([changed, str(new.relative_to(own_tree))])
    assert set(table['path']) == (set(first.table['path']) - {gone}) | set(read)
    pd.testing.assert_frame_equal(Catalogue.read(first.file, own_tree).table, table)


def test_a_large_stale_catalogue_is_used_with_a_warning(
    own_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = update_catalogue(own_tree)
    monkeypatch.setattr(catalogue, 'SMALL', 22)
    assert not read_state(found.file).is_stale
    write_pair(own_tree, KEY._replace(patch=99), GRID)
    assert read_state(found.file).is_stale
    with pytest.warns(UserWarning, match=r'older than the data.*geofm index'):
        assert len(SEN12MSCRTS(own_tree, 'all')) == 11
    update_catalogue(own_tree)
    assert not read_state(found.file).is_stale
    assert len(SEN12MSCRTS(own_tree, 'all')) == 12


def test_a_small_stale_catalogue_is_updated(own_tree: Path) -> None:
    SEN12MSCRTS(own_tree, 'all')
    first, _ = write_pair(own_tree, KEY._replace(patch=99), GRID)
    with pytest.warns(UserWarning, match='was older than the data and has been updated'):
        assert len(SEN12MSCRTS(own_tree, 'all')) == 12
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(SEN12MSCRTS(own_tree, 'all')) == 12
    # Changes in place do not change the modification time of the folder.
    first.write_bytes(b'')
    with pytest.warns(UserWarning, match='files left out'):
        assert len(SEN12MSCRTS(own_tree, 'all')) == 11


def test_a_new_folder_of_the_root_makes_it_stale(own_tree: Path) -> None:
    update_catalogue(own_tree)
    (own_tree / 'ROIs9999').mkdir()
    assert read_state(beside(own_tree)).is_stale


@pytest.mark.parametrize('small', [0, 5000])
def test_every_tree_gets_a_catalogue(
    own_tree: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(catalogue, 'SMALL', small)
    assert len(SEN12MSCRTS(own_tree, 'all')) == 11
    assert find_catalogue(own_tree) == own_tree / CATALOGUE_NAME


def test_a_folder_without_scenes_gets_none(tmp_path: Path) -> None:
    (tmp_path / 'map.tif').write_bytes(b'')
    with pytest.raises(DatasetNotFoundError), pytest.warns(UserWarning, match='1 not named'):
        SEN12MSCRTS(tmp_path)
    assert find_catalogue(tmp_path) is None


def test_headers_are_read_each_time_if_no_catalogue_can_be_saved(
    own_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Catalogue) -> None:
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(Catalogue, 'write', refuse)
    with pytest.warns(UserWarning, match='no catalogue can be saved.*Read-only'):
        assert len(SEN12MSCRTS(own_tree, 'all')) == 11


def test_a_catalogue_elsewhere(own_tree: Path, tmp_path: Path) -> None:
    expected = SEN12MSCRTS(own_tree, 'all')
    beside(own_tree).unlink()
    file = update_catalogue(own_tree, tmp_path / 'c.parquet').file
    for ds in (
        SEN12MSCRTS(own_tree, 'all', catalogue=file),
        SEN12MSCRTS(file, 'all'),
        SEN12MSCRTS(str(file), 'all'),
    ):
        pd.testing.assert_frame_equal(pd.DataFrame(ds.index), pd.DataFrame(expected.index))
        assert torch.equal(ds[3]['image'], expected[3]['image'])
    assert not beside(own_tree).exists()
    # If the folder was moved, it must be given.
    moved = own_tree.rename(tmp_path / 'moved')
    with pytest.raises(ValueError, match='crts, which does not exist'):
        SEN12MSCRTS(file, 'all')
    assert len(SEN12MSCRTS(moved, 'all', catalogue=file)) == 11
    with pytest.raises(ValueError, match='needs one folder'):
        SEN12MSCRTS([moved, tmp_path], 'all', catalogue=file)


def test_the_catalogue_of_read_only_data_is_in_the_cache(
    own_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, 'Read-only file system')

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'touch', refuse)
        made = update_catalogue(own_tree)
    made.file.unlink()
    own_tree.chmod(0o555)
    # The superuser could write to it.
    made = update_catalogue(own_tree)
    assert made.file == in_cache(own_tree)
    assert made.file.is_relative_to(tmp_path / 'cache')
    assert not beside(own_tree).exists()
    assert find_catalogue(own_tree) == made.file
    assert len(SEN12MSCRTS(own_tree, 'all')) == 11


def test_other_files_are_not_catalogues(own_tree: Path) -> None:
    beside(own_tree).write_bytes(b'nonsense')
    with pytest.raises(ValueError, match=r'not a catalogue.*geofm index'):
        SEN12MSCRTS(own_tree)
    update_catalogue(own_tree)
    assert len(SEN12MSCRTS(own_tree, 'all')) == 11


def test_folders_with_and_without_a_catalogue(own_tree: Path, tmp_path: Path) -> None:
    update_catalogue(own_tree)
    other = tmp_path / 'other'
    write_pair(other, KEY._replace(patch=50), GRID)
    assert len(SEN12MSCRTS([own_tree, other], 'all')) == 12
    assert len(SEN12MSCRTS([own_tree, other, own_tree], 'all')) == 12


@pytest.mark.parametrize(
    'name',
    [
        b's1_ROIs1868_36_ImgNo_0_2018-01-03_patch_\xff.tif',
        f's1_ROIs1868_{2**31}_ImgNo_0_2018-01-03_patch_1.tif'.encode(),
        f'ROIs1868_summer_s1_19_p{2**31}.tif'.encode(),
    ],
)
def test_unknown_file_names(own_tree: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(own_tree) + b'/' + name)).write_bytes(b'x')
    table = update_catalogue(own_tree).table
    assert table['sensor'].notna().sum() == 22
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(SEN12MSCRTS(own_tree, 'all')) == 11


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no such folder'):
        update_catalogue(tmp_path / 'none')
    with pytest.raises(ValueError, match='jobs'):
        update_catalogue(tmp_path, jobs=0)
    assert update_catalogue(tmp_path).table.empty


def start_writers(root: Path, connection: Connection) -> None:
    """Start a process that writes all the time, whenever one is asked for and none is left."""
    while connection.recv():
        writer = os.fork()
        while writer == 0:
            catalogue = update_catalogue(root)
            catalogue.table['mtime'] += 1
            catalogue.write()
        connection.send(writer)
        # The next one needs its lock.
        os.waitpid(writer, 0)


def test_a_killed_process_leaves_a_whole_catalogue(
    own_tree: Path, forkserver: ForkServerContext
) -> None:
    """Kill a process that writes all the time at ten random moments."""
    update_catalogue(own_tree)
    rng = np.random.default_rng()
    ours, theirs = multiprocessing.Pipe()
    process = forkserver.Process(target=start_writers, args=(own_tree, theirs))
    process.start()
    for _ in range(10):
        ours.send(True)
        writer = ours.recv()
        time.sleep(rng.uniform(0, 0.3))
        os.kill(writer, signal.SIGKILL)
        table = Catalogue.read(beside(own_tree), own_tree).table
        assert len(table) == 22
        assert table['problem'].isna().all()
    ours.send(False)
    process.join()
    update_catalogue(own_tree).write()
    assert list(own_tree.glob('.*.part*')) == []


# Pairing and filters


@pytest.fixture(params=[False, True], ids=['names', 'catalogue'])
def dates_tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_dates(tmp_path)
    if request.param:
        update_catalogue(tmp_path)
    return tmp_path


def test_nearest(dates_tree: Path) -> None:
    ds = SEN12MSCRTS(dates_tree, pairing='nearest')
    days = [(row.s1_date.day, row.s2_date.day) for row in ds.index.itertuples()]
    assert days == [(11, 9), (11, 12), (21, 30)]
    assert ds.index['time_step'].tolist() == [0, 1, 2]
    assert len(SEN12MSCRTS(dates_tree, pairing='nearest', max_day_gap=2)) == 2


def test_nearest_is_what_a_search_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for sensor in ('s1', 's2'):
        for patch in range(3):
            for step, day in enumerate(rng.choice(np.arange(1, 29), 6, replace=False)):
                key = KEY._replace(patch=patch, time_step=step)
                write_scene(
                    tmp_path, sensor, key, grid_at(32632, 5e5, 5.3e6, 4), date(2018, 1, day)
                )
    ds = SEN12MSCRTS(tmp_path, pairing='nearest')
    assert len(ds) == 18
    for row in ds.index.itertuples():
        names = [SceneName.parse(p) for p in tmp_path.rglob(f's1_*_patch_{row.patch}.tif')]
        gaps = [abs((name.date - row.s2_date.date()).days) for name in names if name is not None]
        assert abs((row.s1_date - row.s2_date).days) == min(gaps)


def test_max_day_gap(dates_tree: Path) -> None:
    for gap, count in ((9, 3), (8, 2), (1, 1)):
        assert len(SEN12MSCRTS(dates_tree, max_day_gap=gap)) == count
    with pytest.raises(EmptySplitError, match='max_day_gap=0'):
        SEN12MSCRTS(dates_tree, max_day_gap=0)


def test_dates(dates_tree: Path) -> None:
    ds = SEN12MSCRTS(dates_tree, dates=('2018-01-01', '2018-01-12'))
    assert ds.index['time_step'].tolist() == [0, 1]
    s2 = SEN12MSCRTS(dates_tree, dates=('2018-01-12', '2018-01-30'), sensors=['s2'])
    assert s2.index['time_step'].tolist() == [1, 2]


@pytest.mark.parametrize('sensor', [SENTINEL1, SENTINEL2], ids=['s1', 's2'])
def test_one_sensor_needs_no_pair(dates_tree: Path, sensor: object) -> None:
    assert sensor in (SENTINEL1, SENTINEL2)
    name, other = ('s1', 's2') if sensor is SENTINEL1 else ('s2', 's1')
    for path in dates_tree.rglob(f'{other}_*.tif'):
        path.unlink()
    if find_catalogue(dates_tree):
        update_catalogue(dates_tree)
    ds = SEN12MSCRTS(dates_tree, sensors=[name])
    assert len(ds) == 3
    sample = ds[1]
    with rasterio.open(ds.index.iloc[1][name]) as src:
        np.testing.assert_array_equal(sample['image'].numpy(), src.read())
        assert sample['bounds'].tolist() == list(src.bounds)
    assert sample['valid'].all()
    assert (sample['dates'] == NO_DATE).tolist() == [name != 's1', name != 's2']
    with pytest.raises(BandError, match='not bands of the sensors'):
        SEN12MSCRTS(dates_tree, sensors=[name], bands=['VV', 'B04'])


def test_cloud_cover(tmp_path: Path) -> None:
    write_dates(tmp_path)
    with pytest.raises(ValueError, match='geofm index --clouds'):
        SEN12MSCRTS(tmp_path, max_cloud_cover=0.5)
    made = update_catalogue(tmp_path)
    with pytest.raises(ValueError, match='geofm index --clouds'):
        SEN12MSCRTS(tmp_path, max_cloud_cover=0.5)
    s2 = made.table['sensor'] == 's2'
    made.table.loc[s2.to_numpy(), 'cloud_cover'] = np.array([0.1, 0.5, 0.9], 'float32')
    made.write()
    ds = SEN12MSCRTS(tmp_path, max_cloud_cover=0.5)
    assert ds.index['time_step'].tolist() == [0, 1]
    # Known cloud covers are kept.
    covers = update_catalogue(tmp_path).table['cloud_cover'][s2]
    assert covers.tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_clouds_of_real_images(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip('s2cloudless')
    files = shared_data / 'real' / 'sen12mscrts_series_oriolac'
    table = update_catalogue(files, tmp_path / 'c.parquet', clouds=True).table
    covers = dict(zip(table['time_step'], table['cloud_cover'], strict=True))
    assert covers[12] < 0.01
    assert covers[15] == pytest.approx(0.16, abs=0.03)
    assert covers[29] > 0.99


@pytest.mark.parametrize(
    'wrong',
    [
        {'sensors': ['s3']},
        {'sensors': 's1'},
        {'sensors': []},
        {'pairing': 'closest'},
        {'max_day_gap': -1},
        {'max_cloud_cover': 2.0},
        {'max_cloud_cover': 0.2, 'sensors': ['s1']},
        {'dates': ('2018-05-01', '2018-01-01')},
        {'dates': ('spring', 'summer')},
        {'on_error': 'ignore'},
    ],
    ids=str,
)
def test_wrong_filters_are_refused(tree: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SEN12MSCRTS(tree, **wrong)  # type: ignore[arg-type]


# Lists of pairs


def test_a_list_of_pairs(dates_tree: Path) -> None:
    ds = SEN12MSCRTS(dates_tree)
    # S1 and S2 of different time steps, and one path that is relative to the list.
    pairs = [
        [ds.index['s1'].iloc[0], ds.index['s2'].iloc[1]],
        [ds.index['s1'].iloc[2], str(Path(ds.index['s2'].iloc[0]).relative_to(dates_tree))],
    ]
    file = dates_tree / 'pairs.json'
    file.write_text(json.dumps(pairs))
    listed = SEN12MSCRTS(file)
    assert listed.index['time_step'].tolist() == [0, 1]
    assert [row.s1 for row in listed.index.itertuples()] == [pairs[1][0], pairs[0][0]]
    assert torch.equal(listed[0]['image'][2:], ds[0]['image'][2:])
    assert torch.equal(listed[0]['image'][:2], ds[2]['image'][:2])
    with pytest.raises(EmptySplitError):
        SEN12MSCRTS(file, 'val')
    for wrong, message in (
        ('{}]', 'not a list'),
        ('[["a.tif", "b.tif"]]', 'not named like'),
        (json.dumps([pairs[0], pairs[0]]), 'listed twice'),
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            SEN12MSCRTS(file)


def test_paths_are_those_of_the_layout(dates_tree: Path) -> None:
    row = SEN12MSCRTS(dates_tree).index.iloc[0]
    assert row['s1'] == str(scene_path(dates_tree, 's1', KEY, date(2018, 1, 1)))
