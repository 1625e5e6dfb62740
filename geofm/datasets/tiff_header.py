"""What the header of a GeoTIFF says, read without opening the file as a raster.

Opening a file with GDAL takes about a millisecond, parsing the first kilobytes of an ordinary one
some ten microseconds; with a million files that is the difference between a quarter of an hour and
a minute. Only what is plain is parsed here: classic TIFF (not BigTIFF), north-up or affine, with a
CRS given by its EPSG code alone. For all else :func:`parse_header` says that it does not know, and
:func:`read_header` asks rasterio.

The format: TIFF 6.0 (Adobe, 1992) and OGC GeoTIFF 1.1 (OGC 19-008r4).
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError
from rasterio.transform import Affine

#: Bytes read at first; the header of a SEN12MS-CR-TS file, with offsets of strips, has about 5 kB.
HEAD = 8192

_FORMATS = {
    1: 'B',
    2: 'c',
    3: 'H',
    4: 'I',
    5: 'II',
    6: 'b',
    7: 'B',
    8: 'h',
    9: 'i',
    10: 'ii',
    11: 'f',
    12: 'd',
}
_KINDS = {1: 'uint', 2: 'int', 3: 'float'}

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _BANDS = 256, 257, 258, 259, 277
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_SIZES = 273, 278, 279
_PLANAR, _PREDICTOR, _TILE_OFFSETS, _TILE_SIZES, _SAMPLE_FORMAT = 284, 317, 324, 325, 339
_PIXEL_SCALE, _TIEPOINTS, _MATRIX, _GEO_KEYS = 33550, 33922, 34264, 34735
_NODATA = 42113

_MODEL_TYPE, _RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1024, 1025, 2048, 3072
#: Keys that repeat what the EPSG code says (citations, units, ellipsoid); others may change it.
_PLAIN_KEYS = {_MODEL_TYPE, _RASTER_TYPE, 1026, _GEOGRAPHIC, 2049, 2054, 2057, 2059}
_PLAIN_KEYS |= {_PROJECTED, 3073, 3076}

#: Entries of a directory beyond which a file is not an ordinary one.
_MOST_ENTRIES = 256
#: Bytes of one tag's value beyond which a file is not an ordinary one.
_MOST_BYTES = 1 << 24


class NotPlainError(Exception):
    """The header has something that is not parsed here, or is none."""


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a raster.

    Attributes:
        width: Number of columns.
        height: Number of rows.
        bands: Number of bands.
        dtype: NumPy's name of the type of the pixels.
        epsg: EPSG code of the CRS, None if it has none.
        transform: Affine coefficients a, b, c, d, e, f.
        nodata: Value that means no data, None if not given.
        end: Number of bytes that the file must have at least for all pixels to be there; 0 where
            not known.
        strips: Offset of each strip of rows, if the pixels are uncompressed, in strips of whole
            rows, interleaved by pixel; otherwise None.
        rows_per_strip: Number of rows in a strip.
        big_endian: Byte order.
    """

    width: int
    height: int
    bands: int
    dtype: str
    epsg: int | None
    transform: tuple[float, ...]
    nodata: float | None
    end: int = 0
    strips: tuple[int, ...] | None = None
    rows_per_strip: int = 0
    big_endian: bool = False


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a raster.

    Args:
        path: Path of the file.

    Returns:
        The header.

    Raises:
        OSError: If the file cannot be read.
        RasterioError: If it is not a raster.
    """
    with Path(path).open('rb', buffering=0) as file:
        try:
            return parse_header(file.fileno())
        except NotPlainError:
            pass
    return _ask_rasterio(path)


def parse_header(descriptor: int) -> Header:
    """Parse the header of an ordinary GeoTIFF.

    Args:
        descriptor: Descriptor of the open file.

    Returns:
        The header.

    Raises:
        NotPlainError: If the file is not an ordinary GeoTIFF; rasterio may know it all the same.
    """
    try:
        return _header(_Tags(descriptor))
    except (struct.error, IndexError, ValueError, OverflowError, ZeroDivisionError) as err:
        raise NotPlainError(str(err)) from err


def read_rows(descriptor: int, header: Header, strip: int) -> npt.NDArray[np.generic]:
    """Read a strip of rows.

    Args:
        descriptor: Descriptor of the open file.
        header: Its header, with :attr:`Header.strips`.
        strip: Number of the strip.

    Returns:
        Pixels, shape (rows, W, C); a strip that the file leaves out is 0.

    Raises:
        ValueError: If the file ends within the strip.
    """
    assert header.strips is not None
    offset = header.strips[strip]
    rows = min(header.rows_per_strip, header.height - strip * header.rows_per_strip)
    shape = (rows, header.width, header.bands)
    dtype = np.dtype(header.dtype).newbyteorder('>' if header.big_endian else '<')
    if offset == 0:
        return np.zeros(shape, dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(os.pread(descriptor, size, offset), dtype).reshape(shape)


def read_window(
    path: str | os.PathLike[str], header: Header, descriptor: int, window: tuple[int, int, int, int]
) -> npt.NDArray[np.generic] | None:
    """Read a window in one go, if the rows lie one after the other in the file.

    Args:
        path: Path of the file, for errors.
        header: Its header.
        descriptor: Descriptor of the open file.
        window: First column, first row, width and height.

    Returns:
        Pixels, shape (height, width, C); None if the rows do not lie so.

    Raises:
        OSError: If the file ends before the window does.
    """
    col, row, width, height = window
    dtype = np.dtype(header.dtype).newbyteorder('>' if header.big_endian else '<')
    stride = header.width * header.bands * dtype.itemsize
    strips = header.strips
    if not strips or not strips[0]:
        return None
    step = stride * header.rows_per_strip
    if strips != tuple(range(strips[0], strips[0] + step * len(strips), step)):
        return None
    content = os.pread(descriptor, stride * height, strips[0] + stride * row)
    if len(content) < stride * height:
        raise OSError(f'{path}: ends within row {row + len(content) // stride}')
    pixels = np.frombuffer(content, dtype).reshape(height, header.width, header.bands)
    return pixels[:, col : col + width]


class _Tags:
    """The first directory of tags of a TIFF file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._head = os.pread(descriptor, HEAD, 0)
        if self._head[:4] not in (b'II*\0', b'MM\0*'):
            raise NotPlainError('not a classic TIFF')
        self.big_endian = self._head[:1] == b'M'
        self._order = '>' if self.big_endian else '<'
        (start,) = self._unpack('I', 4)
        (count,) = self._unpack('H', start)
        if count > _MOST_ENTRIES:
            raise NotPlainError(f'{count} tags')
        entries = self._unpack('HHI4s' * count, start + 2)
        self._entries = {
            entries[i]: (entries[i + 1], entries[i + 2], entries[i + 3], start + 2 + 3 * i)
            for i in range(0, 4 * count, 4)
        }

    def __contains__(self, tag: int) -> bool:
        """Whether a tag is given."""
        return tag in self._entries

    def get(self, tag: int) -> tuple[Any, ...]:
        """All values of a tag; none if it is not given."""
        if tag not in self._entries:
            return ()
        kind, count, inline, position = self._entries[tag]
        if kind not in _FORMATS:
            raise NotPlainError(f'tag of type {kind}')
        code = f'{count}s' if kind == 2 else f'{count * len(_FORMATS[kind])}{_FORMATS[kind][0]}'
        size = struct.calcsize('=' + code)
        if size > _MOST_BYTES:
            raise NotPlainError(f'tag of {size} bytes')
        if size > 4:
            (position,) = struct.unpack(self._order + 'I', inline)
            return self._unpack(code, position)
        return struct.unpack_from(self._order + code, inline)

    def integer(self, tag: int, default: int | None = None) -> int:
        """The first value of a tag."""
        values = self.get(tag)
        value = values[0] if values else default
        if not isinstance(value, int):
            raise NotPlainError(f'tag {tag} is missing or no integer')
        return value

    def integers(self, tag: int) -> tuple[int, ...]:
        """All values of a tag that has integers."""
        values = self.get(tag)
        if not all(isinstance(value, int) for value in values):
            raise NotPlainError(f'tag {tag} is no integers')
        return values

    def floats(self, tag: int) -> tuple[float, ...]:
        """All values of a tag that has numbers."""
        return tuple(float(value) for value in self.get(tag))

    def _unpack(self, code: str, position: int) -> tuple[Any, ...]:
        """Values at a place in the file."""
        size = struct.calcsize('=' + code)
        if position + size <= len(self._head):
            return struct.unpack_from(self._order + code, self._head, position)
        return struct.unpack(self._order + code, os.pread(self._descriptor, size, position))


def _header(tags: _Tags) -> Header:
    """Header from the tags of a file."""
    width, height, bands = (
        tags.integer(_WIDTH),
        tags.integer(_HEIGHT),
        tags.integer(_BANDS, 1),
    )
    bits, kinds = set(tags.integers(_BITS)), set(tags.integers(_SAMPLE_FORMAT)) or {1}
    if len(bits) != 1 or len(kinds) != 1 or not min(width, height, bands):
        raise NotPlainError('bands of several types, or no pixels')
    kind = _KINDS.get(kinds.pop())
    if kind is None:
        raise NotPlainError('complex or undefined pixels')
    dtype = f'{kind}{bits.pop()}'
    if dtype not in ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float32', 'float64'):
        raise NotPlainError(f'pixels of type {dtype}')
    tiled = _TILE_OFFSETS in tags
    offsets = tags.integers(_TILE_OFFSETS if tiled else _STRIP_OFFSETS)
    sizes = tags.integers(_TILE_SIZES if tiled else _STRIP_SIZES)
    if not offsets or len(offsets) != len(sizes):
        raise NotPlainError('no offsets of the pixels')
    rows = min(tags.integer(_ROWS_PER_STRIP, height), height)
    plain = (
        not tiled
        and tags.integer(_COMPRESSION, 1) == 1
        and (bands == 1 or tags.integer(_PLANAR, 1) == 1)
        and tags.integer(_PREDICTOR, 1) == 1
        and len(offsets) == -(-height // rows)
    )
    if plain:
        # The sizes that the file states may be wrong; what the pixels need is known. A strip at 0
        # is left out of the file.
        row = width * bands * np.dtype(dtype).itemsize
        needed = (min(rows, height - i * rows) * row for i in range(len(offsets)))
        sizes = tuple(size if offset else 0 for size, offset in zip(needed, offsets, strict=True))
    return Header(
        width,
        height,
        bands,
        dtype,
        _epsg(tags),
        _transform(tags),
        _nodata(tags),
        end=max(offset + size for offset, size in zip(offsets, sizes, strict=True)),
        strips=offsets if plain else None,
        rows_per_strip=rows if plain else 0,
        big_endian=tags.big_endian,
    )


def _epsg(tags: _Tags) -> int:
    """EPSG code of the CRS."""
    keys = tags.integers(_GEO_KEYS)
    if len(keys) < 4 or len(keys) < 4 + 4 * keys[3]:
        raise NotPlainError('no CRS')
    values = {}
    for i in range(4, 4 + 4 * keys[3], 4):
        key, location, _, value = keys[i : i + 4]
        if key not in _PLAIN_KEYS:
            raise NotPlainError(f'GeoTIFF key {key}')
        if location == 0:
            values[key] = value
    # A point at the pixel's centre moves the grid by half a pixel, or not: GDAL has options.
    if values.get(_RASTER_TYPE, 1) != 1:
        raise NotPlainError('pixel is point')
    code = values.get(_PROJECTED if values.get(_MODEL_TYPE) == 1 else _GEOGRAPHIC, 0)
    if values.get(_MODEL_TYPE) not in (1, 2) or not 1024 <= code < 32767:
        raise NotPlainError('no EPSG code')
    return code


def _transform(tags: _Tags) -> tuple[float, ...]:
    """Affine coefficients."""
    scale, ties, matrix = (tags.floats(tag) for tag in (_PIXEL_SCALE, _TIEPOINTS, _MATRIX))
    if len(scale) >= 2 and len(ties) == 6 and not matrix:
        a, e = scale[0], -scale[1]
        return a, 0.0, ties[3] - ties[0] * a, 0.0, e, ties[4] - ties[1] * e
    if len(matrix) == 16 and not scale:
        return (*matrix[0:2], matrix[3], *matrix[4:6], matrix[7])
    raise NotPlainError('no affine transform')


def _nodata(tags: _Tags) -> float | None:
    """The nodata value."""
    if _NODATA not in tags:
        return None
    (text,) = tags.get(_NODATA)
    return float(bytes(text).rstrip(b'\0 '))


def _ask_rasterio(path: str | os.PathLike[str]) -> Header:
    """Header as GDAL reads it."""
    with rasterio.open(path) as src:
        if len(set(src.dtypes)) != 1:
            raise RasterioError(f'{path}: bands of several types')
        return Header(
            src.width,
            src.height,
            src.count,
            src.dtypes[0],
            src.crs.to_epsg() if src.crs else None,
            tuple(Affine(*src.transform[:6]))[:6],
            src.nodata,
        )
