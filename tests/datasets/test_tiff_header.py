import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.datasets.readers.tiff_header import (
    Header,
    NotPlainError,
    header_of,
    parse_header,
    read_rows,
    read_window,
)
from geofm.rasters import open_raster

UTM = CRS.from_epsg(32632)
NORTH_UP = Affine(10, 0, 500000, 0, -10, 5300000)


def write(path: Path, **profile: Any) -> Path:
    profile = {
        'driver': 'GTiff',
        'width': 40,
        'height': 24,
        'count': 3,
        'dtype': 'uint16',
        'crs': UTM,
        'transform': NORTH_UP,
        'interleave': 'pixel',
    } | profile
    shape = (profile['count'], profile['height'], profile['width'])
    pixels = np.random.default_rng(0).integers(1, 100, shape).astype(profile['dtype'])
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(pixels)
    return path


def read_header(path: Path) -> Header:
    with path.open('rb', buffering=0) as file:
        try:
            return parse_header(path, file.fileno())
        except NotPlainError:
            pass
    with open_raster(path) as src:
        return header_of(src)


def check_against_rasterio(path: Path) -> None:
    header = read_header(path)
    with rasterio.open(path) as src:
        assert (header.width, header.height, header.bands) == (src.width, src.height, src.count)
        assert header.dtype == src.dtypes[0]
        assert header.epsg == (src.crs.to_epsg() if src.crs else None)
        assert header.transform == tuple(src.transform)[:6]
        assert repr(header.nodata) == repr(src.nodata)
        assert header.end <= path.stat().st_size
        if header.strips is None:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            rows = [read_rows(descriptor, header, i) for i in range(len(header.strips))]
        finally:
            os.close(descriptor)
        np.testing.assert_array_equal(np.concatenate(rows), np.moveaxis(src.read(), 0, -1))


def is_plain(path: Path) -> bool:
    with path.open('rb') as file:
        try:
            parse_header(path, file.fileno())
        except NotPlainError:
            return False
    return True


def test_similar_headers_keep_their_own_transform(tmp_path: Path) -> None:
    # A header cached for another file must equal the header of this file.
    profiles: list[dict[str, Any]] = [
        {},
        {'transform': Affine(20, 0, 400000, 0, -20, 5200000)},
        {'transform': Affine(20, 3, 400000, 2, -20, 5200000)},
        {'crs': CRS.from_epsg(32633)},
        {'nodata': 7},
        {'nodata': 8},
        {'dtype': 'int16'},
        {'ENDIANNESS': 'BIG'},
        {'blockysize': 5},
    ]
    paths = [write(tmp_path / f'{i}.tif', **profile) for i, profile in enumerate(profiles)]
    for path in (*paths, *reversed(paths)):
        check_against_rasterio(path)
        with path.open('rb') as file:
            whole = parse_header(path, file.fileno())
            part = parse_header(path, file.fileno(), measure=False)
        assert whole.end > 0
        assert part == dataclasses.replace(whole, end=0, used=0)


def test_a_directory_at_another_position_is_measured_again(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.tif')
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from('<I', content, 4)
    (count,) = struct.unpack_from('<H', content, start)
    directory = content[start : start + 2 + 12 * count + 4]
    moved = tmp_path / 'b.tif'
    content += bytes(len(content) % 2)
    struct.pack_into('<I', content, 4, len(content))
    moved.write_bytes(content + directory)
    first, second = read_header(path), read_header(moved)
    assert second.used == moved.stat().st_size
    assert dataclasses.replace(second, used=first.used) == first


@pytest.mark.parametrize('change', [0, 1])
def test_a_window_of_strips_with_gaps_is_left_to_gdal(tmp_path: Path, change: int) -> None:
    path = write(tmp_path / 'a.tif', blockysize=8)
    content = bytearray(path.read_bytes())
    with path.open('rb') as file:
        header = parse_header(path, file.fileno())
        assert header.strips is not None
        with rasterio.open(path) as src:
            expected = np.moveaxis(src.read(window=Window(3, 5, 20, 15)), 0, -1)
        window = read_window(path, header, file.fileno(), (3, 5, 20, 15))
    assert window is not None
    np.testing.assert_array_equal(window, expected)
    # The second strip is at the offset of the third one, or is missing in the file.
    offsets = struct.pack('<3I', *header.strips)
    other = header.strips[2] if change else 0
    at = content.index(offsets)
    content[at : at + 12] = struct.pack('<3I', header.strips[0], other, header.strips[2])
    path.write_bytes(content)
    with path.open('rb') as file:
        try:
            header = parse_header(path, file.fileno(), measure=False)
        except NotPlainError:
            return
        assert read_window(path, header, file.fileno(), (3, 5, 20, 15)) is None


@pytest.mark.parametrize(
    'profile',
    [
        {},
        {'ENDIANNESS': 'BIG'},
        {'dtype': 'float32', 'count': 2, 'nodata': -9999.0},
        {'dtype': 'int16', 'nodata': -1},
        {'interleave': 'band'},
        {'compress': 'deflate', 'predictor': 2},
        {'tiled': True, 'blockxsize': 16, 'blockysize': 16},
        {'crs': CRS.from_epsg(4326), 'transform': Affine(1e-4, 0, 12.1, 0, -1e-4, 47.3)},
        {'transform': Affine(10, 1, 500000, 1, -10, 5300000)},
        {'count': 1, 'dtype': 'uint8'},
        {'count': 13, 'height': 700},
        {'crs': CRS.from_proj4('+proj=tmerc +lat_0=1 +lon_0=3 +k=0.99 +ellps=bessel +units=m')},
    ],
    ids=str,
)
def test_ordinary_files_are_parsed_as_rasterio_reads_them(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    path = write(tmp_path / 'a.tif', **profile)
    assert is_plain(path)
    check_against_rasterio(path)


@pytest.mark.parametrize(
    'profile',
    [
        {'BIGTIFF': 'YES'},
        {'crs': None},
        {'dtype': 'complex64'},
    ],
    ids=str,
)
def test_other_files_are_left_to_rasterio(tmp_path: Path, profile: dict[str, Any]) -> None:
    path = write(tmp_path / 'a.tif', **profile)
    assert not is_plain(path)
    check_against_rasterio(path)


def test_pixel_is_point_is_left_to_rasterio(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.tif')
    with rasterio.open(path, 'r+') as dst:
        dst.update_tags(AREA_OR_POINT='Point')
    assert not is_plain(path)
    check_against_rasterio(path)


def test_sparse_files(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    profile = {'width': 9, 'height': 700, 'count': 13, 'dtype': 'uint16'}
    rasterio.open(
        path, 'w', driver='GTiff', crs=UTM, transform=NORTH_UP, SPARSE_OK=True, **profile
    ).close()
    check_against_rasterio(path)


def test_real_files(shared_data: Path) -> None:
    files = sorted((shared_data / 'real').rglob('*.tif'))
    assert len(files) > 20
    for path in files:
        check_against_rasterio(path)


KINDS: list[dict[str, Any]] = [
    {'dtype': 'float32', 'count': 2, 'nodata': -9999.0},
    {'dtype': 'int16', 'nodata': -1},
    {'ENDIANNESS': 'BIG'},
    {'interleave': 'band'},
    {'compress': 'deflate', 'predictor': 2},
    {'tiled': True, 'blockxsize': 16, 'blockysize': 16},
    {'crs': CRS.from_epsg(4326), 'transform': Affine(1e-4, 0, 12.1, 0, -1e-4, 47.3)},
    {'transform': Affine(10, 1, 500000, 1, -10, 5300000), 'count': 1, 'dtype': 'uint8'},
]


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_accepted_headers_equal_those_of_rasterio(
    tmp_path: Path, kind: dict[str, Any], data: st.DataObject
) -> None:
    """Change any bytes of the header of a valid file."""
    path = write(tmp_path / 'a.tif', **kind)
    content = bytearray(path.read_bytes())
    order = '>' if content[:1] == b'M' else '<'
    (start,) = struct.unpack_from(order + 'I', content, 4)
    (count,) = struct.unpack_from(order + 'H', content, start)
    directory = st.integers(start, start + 2 + 12 * count + 3)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(directory | st.integers(0, min(len(content), start + 12 * count + 700) - 1))
        content[at] = data.draw(
            st.integers(0, 255) | st.sampled_from([content[at] ^ 1 << bit for bit in range(8)])
        )
    path.write_bytes(content)
    # A file that is too short is not read.
    if is_plain(path) and read_header(path).end <= len(content):
        check_against_rasterio(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_broken_headers_raise_no_other_error(tmp_path: Path, data: st.DataObject) -> None:
    """Parse any bytes, and a valid file with any bytes changed."""
    good = tmp_path / 'good.tif'
    if not good.exists():
        write(good)
    content = bytearray(good.read_bytes()[:1200])
    if data.draw(st.booleans()):
        content = bytearray(struct.pack('<4sI', b'II*\0', 8) + data.draw(st.binary(max_size=300)))
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / 'bad.tif'
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    is_plain(path)
