import os
import shutil
import struct
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.windows import Window
from torch.utils.data import DataLoader

from geofm.datasets import SEN12MSCRTS, EmptySplitError, MultiDate
from geofm.datasets.catalogue.catalogue import update_catalogue
from geofm.datasets.catalogue.inspection import GAPS, Problem, inspect
from geofm.datasets.pairs.skipped import Reason
from geofm.grid import Grid
from geofm.sen12ms import PairKey
from tests.datasets.tree import SIZE, grid_at, random_pixels, write_pair, write_raster

KEY = PairKey('ROIs1868', 36, 0, 0)
GRID = grid_at(32632, 500000, 5300000)
OWN_CRS = CRS.from_proj4('+proj=tmerc +lat_0=1 +lon_0=3 +k=0.99 +x_0=7 +ellps=bessel +units=m')


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def nan(path: Path) -> None:
    write_raster(path, np.full((2, SIZE, SIZE), np.nan, 'float32'), GRID)


def nodata(path: Path) -> None:
    write_raster(path, np.full((2, SIZE, SIZE), -9999, 'float32'), GRID, nodata=-9999)


def linear(path: Path) -> None:
    power = np.random.default_rng(0).uniform(0.001, 3, (2, SIZE, SIZE)).astype('float32')
    write_raster(path, power, GRID)


def own_crs(path: Path) -> None:
    grid = Grid(OWN_CRS, Affine.scale(10, -10), SIZE, SIZE)
    write_raster(path, random_pixels(path.name[:2], grid, 1), grid)


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to('nowhere.tif')


def duplicate(path: Path) -> None:
    shutil.copy(path, path.with_name(path.name.replace('2018-02-2', '2018-03-2')))


BREAKS: dict[str, tuple[Problem, str, Callable[[Path], object]]] = {
    'zero bytes': (Problem.EMPTY, 's2', lambda path: path.write_bytes(b'')),
    'no tiff': (Problem.UNREADABLE, 's1', lambda path: path.write_bytes(b'II*\0 and no more')),
    'truncated': (Problem.TRUNCATED, 's2', truncate),
    'bands': (
        Problem.BAND_COUNT,
        's2',
        lambda path: write_raster(path, random_pixels('s2', GRID, 0)[:12], GRID),
    ),
    'dtype': (
        Problem.DTYPE,
        's2',
        lambda path: write_raster(path, random_pixels('s2', GRID, 0).astype('float32'), GRID),
    ),
    'own crs': (Problem.NO_EPSG, 's1', own_crs),
    'nan': (Problem.NO_DATA, 's1', nan),
    'nodata': (Problem.NO_DATA, 's1', nodata),
    'zeros': (
        Problem.ZEROS,
        's2',
        lambda path: write_raster(path, np.zeros((13, SIZE, SIZE), 'uint16'), GRID),
    ),
    'linear': (Problem.LINEAR, 's1', linear),
    'duplicate': (Problem.DUPLICATE, 's1', duplicate),
    'name': (Problem.NAME, 's2', lambda path: path.rename(path.with_name('s2_patch.tif'))),
    'broken link': (
        Problem.UNREADABLE,
        's1',
        break_link,
    ),
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for patch in range(4):
        write_pair(tmp_path, KEY._replace(patch=patch), GRID)
    return tmp_path


@pytest.mark.parametrize('kind', BREAKS)
def test_bad_files_are_marked_and_never_seen(pairs: Path, kind: str) -> None:
    problem, sensor, break_it = BREAKS[kind]
    path = next(pairs.rglob(f'{sensor}_*_patch_0.tif'))
    break_it(path)
    catalogue = update_catalogue(pairs)
    problems = catalogue.problems()
    assert problems['problem'].tolist() == [problem]
    assert problems['files'].tolist() == [2 if kind == 'duplicate' else 1]
    first = problems['first'][0]
    assert first == min(catalogue.table['path'][catalogue.table['problem'].notna()])
    assert first.startswith(str(path.parent.relative_to(pairs)))
    with pytest.warns(UserWarning, match='files left out'):
        ds = SEN12MSCRTS(pairs)
    assert ds.index['patch'].tolist() == [1, 2, 3]
    # The partner of a bad file is not reported as a file without a partner, unless the name of the
    # bad file is unknown.
    expected = {'duplicate': 2, 'name': 2}.get(kind, 1)
    assert len(ds.skipped) == expected
    assert ds.skipped.count(Reason.ONLY_S1, Reason.ONLY_S2) == (kind == 'name')


def test_a_file_that_may_not_be_read(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(pairs.rglob('s1_*_patch_0.tif'))
    path.chmod(0)
    if os.access(path, os.R_OK):
        # The superuser may read any file, so simulate the error.
        really = Path.open

        def refuse(self: Path, *args: object, **kwargs: object) -> object:
            if self == path:
                raise PermissionError(13, 'Permission denied')
            return really(self, *args, **kwargs)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, 'open', refuse)
    assert update_catalogue(pairs).problems()['problem'].tolist() == [Problem.PERMISSION]
    path.chmod(0o644)
    monkeypatch.undo()
    # Neither size nor modification time have changed.
    assert update_catalogue(pairs).problems().empty


def test_a_few_gaps_are_reported_and_masked(pairs: Path) -> None:
    path = next(pairs.rglob('s1_*_patch_0.tif'))
    pixels = random_pixels('s1', GRID, 1)
    pixels[0, SIZE // 2, 3] = np.nan
    write_raster(path, pixels, GRID)
    assert update_catalogue(pairs).problems()['problem'].tolist() == [GAPS]
    ds = SEN12MSCRTS(pairs)
    assert len(ds) == 4
    assert (~ds[0]['valid']).nonzero().tolist() == [[SIZE // 2, 3]]


@pytest.mark.parametrize('sensor', ['s1', 's2'])
def test_rows_that_look_bad_in_a_good_file(pairs: Path, sensor: str) -> None:
    """The inspected rows are empty or look like power, and the others are valid."""
    pixels = random_pixels(sensor, GRID, 1)
    rows = [int(share * SIZE) for share in (0.1, 0.5, 0.9)]
    strips = sorted({row + d for row in rows for d in range(-8, 9) if 0 <= row + d < SIZE})
    pixels[:, strips[:-1]] = 0 if sensor == 's2' else 5
    write_raster(next(pairs.rglob(f'{sensor}_*_patch_0.tif')), pixels, GRID)
    assert Problem.ZEROS not in update_catalogue(pairs).problems()['problem'].tolist()
    assert len(SEN12MSCRTS(pairs)) == 4


def test_a_bad_file_is_no_partner(tmp_path: Path) -> None:
    """If the nearest S1 is bad, the next one is used. S2 has no S1 only if all are bad."""
    for step, (s1, s2) in enumerate(((1, 2), (20, 28))):
        days = date(2018, 1, s1), date(2018, 1, s2)
        write_pair(tmp_path, KEY._replace(time_step=step), GRID, *days)
    truncate(next(tmp_path.rglob('s1_*2018-01-01*')))
    with pytest.warns(UserWarning, match='^files left out: 1 marked as bad'):
        ds = SEN12MSCRTS(tmp_path, pairing='nearest')
    assert [day.day for day in ds.index['s1_date']] == [20, 20]
    truncate(next(tmp_path.rglob('s1_*2018-01-20*')))
    with (
        pytest.warns(UserWarning, match='older|left out'),
        pytest.raises(EmptySplitError, match='2 marked as bad') as err,
    ):
        SEN12MSCRTS(tmp_path, pairing='nearest')
    assert 'without' not in str(err.value)


def test_all_problems_in_one_table(pairs: Path) -> None:
    truncate(next(pairs.rglob('s2_*_patch_0.tif')))
    truncate(next(pairs.rglob('s2_*_patch_1.tif')))
    linear(next(pairs.rglob('s1_*_patch_2.tif')))
    problems = update_catalogue(pairs).problems()
    assert dict(zip(problems['problem'], problems['files'], strict=True)) == {
        Problem.TRUNCATED: 2,
        Problem.LINEAR: 1,
    }


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_the_bytes_are_the_scan_finishes(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / 'good.tif'
    sensor = data.draw(st.sampled_from(['s1', 's2']))
    write_raster(good, random_pixels(sensor, GRID, 0), GRID)
    content = bytearray(good.read_bytes())
    size = len(content)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, 600))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, size))
    bad = tmp_path / 'bad.tif'
    bad.write_bytes(data.draw(st.binary(max_size=400)) if cut == 1 else content[:cut])
    inspect(bad, sensor)


@given(cut=st.integers(0, 2 * SIZE * SIZE * 4))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_truncation_is_found(tmp_path: Path, cut: int) -> None:
    path = tmp_path / 'a.tif'
    write_raster(path, random_pixels('s1', GRID, 0), GRID)
    content = path.read_bytes()
    path.write_bytes(content[: min(cut, len(content) - 1)])
    # GDAL may read a file that is cut within the header, but without its CRS.
    assert inspect(path, 's1').problem is not None


# Files that break after indexing


@pytest.fixture
def broken_later(pairs: Path) -> Path:
    update_catalogue(pairs)
    return pairs


def test_a_file_that_breaks_later_is_named(broken_later: Path) -> None:
    ds = SEN12MSCRTS(broken_later)
    path = Path(ds.index['s2'].iloc[1])
    truncate(path)
    with pytest.raises(ValueError, match=path.name):
        ds[1]


@pytest.mark.parametrize('kind', ['nan', 'nodata', 'zeros'])
def test_a_file_that_is_empty_later_is_named(broken_later: Path, kind: str) -> None:
    ds = SEN12MSCRTS(broken_later)
    _, sensor, break_it = BREAKS[kind]
    path = ds.files_of(1)[('s1', 's2').index(sensor)]
    break_it(path)
    with pytest.raises(ValueError, match=f'{path.name}.*every pixel is NaN'):
        ds[1]
    # Windows may be in a gap.
    assert not ds.read_pair(1, Window(0, 0, 4, 4))['valid'].any()


def test_with_on_error_skip_another_pair_is_drawn_and_counted(broken_later: Path) -> None:
    ds = SEN12MSCRTS(broken_later, on_error='skip')
    others = [ds[i]['image'] for i in (0, 2, 3)]
    truncate(Path(ds.index['s2'].iloc[1]))
    image = ds[1]['image']
    assert any(torch.equal(image, other) for other in others)
    assert ds.failures >= 1
    assert ds.read_pair(1, Window(0, 0, 8, 8))['image'].shape == (15, 8, 8)
    # A window that is not inside the patch is an error of the caller.
    with pytest.raises(ValueError, match='whole pixels'):
        ds.read_pair(1, Window(0, 0, 99, 99))


@pytest.mark.parametrize('method', ['fork', 'forkserver'])
@pytest.mark.usefixtures('forkserver')
def test_failures_are_counted_across_processes(broken_later: Path, method: str) -> None:
    ds = SEN12MSCRTS(broken_later, on_error='skip')
    truncate(Path(ds.index['s2'].iloc[1]))
    loader = DataLoader(ds, batch_size=2, num_workers=2, multiprocessing_context=method)
    assert sum(len(batch['image']) for batch in loader) == 4
    # Every attempt is counted.
    assert ds.failures == len(ds.failed()) >= 1
    assert set(ds.failed()) == {ds.index['s2'].iloc[1]}


def test_dates_of_a_sample_show_one_place_even_if_files_break(tmp_path: Path) -> None:
    for patch in range(2):
        for step in range(3):
            write_pair(tmp_path, KEY._replace(patch=patch, time_step=step), GRID)
    ds = SEN12MSCRTS(tmp_path, on_error='skip')
    truncate(ds.files_of(1)[1])
    places = MultiDate(ds, 3)
    sample = places[0]
    assert sample['index'] == 1
    assert sorted(sample['pairs'].tolist()) == [3, 4, 5]
    assert set(ds.failed()) == {str(ds.files_of(1)[1])}


def test_skipping_all_files_is_an_error(broken_later: Path) -> None:
    ds = SEN12MSCRTS(broken_later, on_error='skip')
    for path in ds.index['s2']:
        truncate(Path(path))
    with pytest.raises(ValueError, match='cannot be read'):
        ds[0]


def test_days_of_the_tree(pairs: Path) -> None:
    assert SEN12MSCRTS(pairs).index['s1_date'].iloc[0].date() == date(2018, 2, 28)


# Headers with impossible numbers


def patch_tag(path: Path, tag: int, kind: int, value: bytes) -> None:
    """Overwrite the inline value of a tag, or the value that it points to."""
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from('<I', content, 4)
    (count,) = struct.unpack_from('<H', content, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from('<H', content, at)[0] != tag:
            continue
        if len(value) <= 4:
            struct.pack_into('<HHI4s', content, at, tag, kind, 1, value.ljust(4, b'\0'))
        else:
            (where,) = struct.unpack_from('<I', content, at + 8)
            content[where : where + len(value)] = value
        path.write_bytes(content)
        return
    raise AssertionError(f'no tag {tag}')


PIXEL_SCALE = 33550


@pytest.mark.parametrize(
    ('scale', 'problem'),
    [
        (1e300, Problem.TRANSFORM),
        (float('nan'), Problem.TRANSFORM),
        (float('inf'), Problem.TRANSFORM),
        # GDAL then ignores the CRS too.
        (0.0, Problem.NO_EPSG),
    ],
)
def test_a_transform_that_maps_nothing_to_the_ground(
    pairs: Path, scale: float, problem: Problem
) -> None:
    path = next(pairs.rglob('s2_*_patch_0.tif'))
    patch_tag(path, PIXEL_SCALE, 12, struct.pack('<2d', scale, scale))
    assert update_catalogue(pairs).problems()['problem'].tolist() == [problem]
    with pytest.warns(UserWarning, match='files left out'):
        assert SEN12MSCRTS(pairs).index['patch'].tolist() == [1, 2, 3]


def test_a_width_beyond_the_file_does_not_end_the_scan(pairs: Path) -> None:
    path = next(pairs.rglob('s1_*_patch_0.tif'))
    patch_tag(path, 256, 4, struct.pack('<I', 0x7FFFFF20))
    assert update_catalogue(pairs).problems()['problem'].tolist() == [Problem.TRUNCATED]


def test_a_compressed_file_that_claims_to_be_huge_is_not_read(pairs: Path) -> None:
    path = next(pairs.rglob('s2_*_patch_0.tif'))
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        width=60_000,
        height=60_000,
        count=13,
        dtype='uint16',
        crs=GRID.crs,
        transform=GRID.transform,
        tiled=True,
        compress='deflate',
        SPARSE_OK=True,
    ):
        pass
    assert update_catalogue(pairs).problems()['problem'].tolist() == [Problem.TOO_LARGE]


@pytest.mark.parametrize('size', [SIZE // 2, SIZE * 2])
def test_a_file_that_was_replaced_is_not_stretched(broken_later: Path, size: int) -> None:
    ds = SEN12MSCRTS(broken_later)
    path = Path(ds.index['s2'].iloc[0])
    other = grid_at(32632, 500_000, 5_300_000, size)
    write_raster(path, random_pixels('s2', other, 0), other)
    if size < SIZE:
        with pytest.raises(ValueError, match=path.name):
            ds[0]
    else:
        with rasterio.open(path) as src:
            expected = src.read(window=Window(0, 0, SIZE, SIZE)).astype('float32')
        np.testing.assert_array_equal(ds[0]['image'][2:].numpy(), expected)


def test_a_replaced_file_elsewhere_is_refused(broken_later: Path) -> None:
    ds = SEN12MSCRTS(broken_later)
    path = Path(ds.index['s2'].iloc[0])
    moved = grid_at(32632, 500_003, 5_300_000)
    write_raster(path, random_pixels('s2', moved, 0), moved)
    with pytest.raises(ValueError, match=f'{path.name}.*has changed'):
        ds[0]


@pytest.mark.parametrize('sensor', ['s1', 's2'])
@pytest.mark.parametrize(
    'other', [grid_at(32632, 500_000, 5_300_000, SIZE // 2), grid_at(32632, 500_003, 5_300_000)]
)
def test_a_replaced_file_of_one_sensor_is_refused(
    broken_later: Path, sensor: str, other: Grid
) -> None:
    ds = SEN12MSCRTS(broken_later, sensors=[sensor])
    (path,) = ds.files_of(0)
    write_raster(path, random_pixels(sensor, other, 0), other)
    with pytest.raises(ValueError, match=f'{path.name}.*has changed'):
        ds[0]


def test_gaps_that_the_scan_missed_are_masked(pairs: Path) -> None:
    """The scan inspects only some rows; reading inspects all."""
    path = next(pairs.rglob('s1_*_patch_0.tif'))
    pixels = random_pixels('s1', GRID, 1)
    with rasterio.open(path, 'w', **_one_row_a_strip(pixels)) as dst:
        pixels[1, 7, 5] = np.nan
        dst.write(pixels)
    assert update_catalogue(pairs).problems().empty
    assert (~SEN12MSCRTS(pairs)[0]['valid']).nonzero().tolist() == [[7, 5]]


def _one_row_a_strip(pixels: npt.NDArray[np.generic]) -> dict[str, Any]:
    count, height, width = pixels.shape
    return {
        'driver': 'GTiff',
        'count': count,
        'height': height,
        'width': width,
        'dtype': pixels.dtype,
        'crs': GRID.crs,
        'transform': GRID.transform,
        'interleave': 'pixel',
        'blockysize': 1,
    }


def test_hidden_folders_are_ignored(pairs: Path) -> None:
    shutil.copytree(pairs / 'ROIs1868', pairs / '.snapshot' / 'ROIs1868')
    assert update_catalogue(pairs).problems().empty
    assert len(SEN12MSCRTS(pairs)) == 4
