"""Parse the headers of ordinary GeoTIFF files without GDAL.

Opening a file with GDAL takes about a millisecond, while parsing the first kilobytes of an ordinary
file takes about ten microseconds. For a million files, that is a quarter of an hour compared to a
minute. Only ordinary files are parsed here: classic TIFF (not BigTIFF), one image without a mask,
only known tags with common values, bands without names, scale and offset, and an affine transform.
For all other files :func:`parse_header` raises an error, and callers use rasterio and
:func:`header_of`. The CRS is decoded by GDAL, once per set of geokeys.

The format is specified in TIFF 6.0 (Adobe, 1992) and OGC GeoTIFF 1.1 (OGC 19-008r4).
"""

import math
import operator
import os
import re
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine

#: Number of bytes read first. The header of a SEN12MS-CR-TS file with its strip offsets has about 5
#: kB.
HEAD = 8192

_KINDS = {1: 'uint', 2: 'int', 3: 'float'}

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _BANDS = 256, 257, 258, 259, 262, 277
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_SIZES, _PLANAR = 273, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES = 317, 322, 323, 324, 325
_EXTRA, _SAMPLE_FORMAT = 338, 339
_PIXEL_SCALE, _TIEPOINTS, _MATRIX = 33550, 33922, 34264
_GEO_KEYS, _GEO_DOUBLES, _GEO_TEXT, _METADATA, _NODATA = 34735, 34736, 34737, 42112, 42113

_TEXT, _SHORT, _LONG, _DOUBLE = 2, 3, 4, 12
_FORMATS = {_TEXT: 's', _SHORT: 'H', _LONG: 'I', _DOUBLE: 'd'}

#: Allowed types of the values of each tag. A file with another tag is not ordinary, as the tag may
#: change its meaning.
_TYPES = {
    **dict.fromkeys((_WIDTH, _HEIGHT, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT), (_SHORT, _LONG)),
    **dict.fromkeys((_STRIP_OFFSETS, _STRIP_SIZES, _TILE_OFFSETS, _TILE_SIZES), (_SHORT, _LONG)),
    **dict.fromkeys((_BITS, _COMPRESSION, _PHOTOMETRIC, _BANDS, _PLANAR, _PREDICTOR), (_SHORT,)),
    **dict.fromkeys((_EXTRA, _SAMPLE_FORMAT, _GEO_KEYS), (_SHORT,)),
    **dict.fromkeys((_PIXEL_SCALE, _TIEPOINTS, _MATRIX, _GEO_DOUBLES), (_DOUBLE,)),
    **dict.fromkeys((_GEO_TEXT, _METADATA, _NODATA), (_TEXT,)),
}

_RASTER_TYPE = 1025

#: None, LZW and deflate, which every build of GDAL can read.
_COMPRESSIONS = (1, 5, 8)

#: Numbers whose text form is unambiguous.
_NUMBER = re.compile(rb'-?\d{1,15}(\.\d{1,9})?|nan')

#: Maximum number of directory entries of an ordinary file.
_MOST_ENTRIES = 256
#: Maximum size in bytes of the value of a tag of an ordinary file.
_MOST_BYTES = 1 << 24


#: Suffixes of sidecar files that change how GDAL reads a file: masks and metadata.
_SIDECARS = ('.msk', '.aux.xml')


#: Number of headers that are cached.
_MOST_SEEN = 256


class NotPlainError(Exception):
    """The file is not an ordinary GeoTIFF that is parsed here."""


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a raster.

    Attributes:
        width: Number of columns.
        height: Number of rows.
        bands: Number of bands.
        dtype: NumPy name of the data type.
        epsg: EPSG code of the CRS; None if there is none.
        transform: Affine coefficients a, b, c, d, e, f.
        nodata: Nodata value; None if there is none.
        end: Minimum size of the file in bytes so that it contains all pixels; 0 if unknown.
        used: Number of bytes up to the last byte that the header refers to; 0 if unknown.
        strips: Offset of each strip, if the pixels are uncompressed, in strips of whole rows, and
            interleaved by pixel; otherwise None.
        rows_per_strip: Number of rows in a strip.
        side_by_side: Whether the strips are contiguous in the file.
        big_endian: Whether the byte order is big-endian.
    """

    width: int
    height: int
    bands: int
    dtype: str
    epsg: int | None
    transform: tuple[float, ...]
    nodata: float | None
    end: int = 0
    used: int = 0
    strips: tuple[int, ...] | None = None
    rows_per_strip: int = 0
    side_by_side: bool = False
    big_endian: bool = False


#: Cached headers. The key is all bytes that determine a header except its transform, and whether it
#: is measured.
_SEEN: dict[tuple[tuple[bytes, ...], bool], Header] = {}


def parse_header(path: str | os.PathLike[str], descriptor: int, measure: bool = True) -> Header:
    """Parse the header of an ordinary GeoTIFF.

    Args:
        path: Path of the file, to check for sidecar files.
        descriptor: Descriptor of the open file.
        measure: Whether to compute :attr:`Header.end` and :attr:`Header.used`, which inspects every
            strip and is not needed for reading.

    Returns:
        The header.

    Raises:
        NotPlainError: If the file is not an ordinary GeoTIFF. rasterio may still be able to read
            it.
    """
    name = os.fspath(path)
    # Faster than os.path.exists, which raises and catches an error if there is no such file.
    if any(os.access(name + suffix, os.F_OK) for suffix in _SIDECARS):
        raise NotPlainError('sidecar files')
    try:
        tags = _Tags(descriptor)
        content = tags.content()
        if content is None:
            return _header(tags, measure)
        # The headers of files of an archive are mostly identical except for the transform.
        header = _SEEN.get((content, measure))
        if header is not None:
            return replace(header, transform=_transform(tags))
        header = _header(tags, measure)
        if len(_SEEN) >= _MOST_SEEN:
            _SEEN.clear()
        _SEEN[content, measure] = header
        return header
    except (struct.error, IndexError, ValueError, OverflowError, RasterioError) as err:
        raise NotPlainError(str(err)) from err


def read_rows(descriptor: int, header: Header, strip: int) -> npt.NDArray[np.generic]:
    """Read a strip of rows.

    Args:
        descriptor: Descriptor of the open file.
        header: Its header, with :attr:`Header.strips`.
        strip: Number of the strip.

    Returns:
        Pixels, shape (rows, W, C). A strip that is missing in a sparse file is 0.

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
    """Read a window at once, if its rows are contiguous in the file.

    Args:
        path: Path of the file, for error messages.
        header: Its header.
        descriptor: Descriptor of the open file.
        window: First column, first row, width and height.

    Returns:
        Pixels, shape (height, width, C); None if the rows are not contiguous.

    Raises:
        OSError: If the file ends before the window does.
    """
    col, row, width, height = window
    dtype = np.dtype(header.dtype).newbyteorder('>' if header.big_endian else '<')
    stride = header.width * header.bands * dtype.itemsize
    strips = header.strips
    if not strips or not strips[0] or not header.side_by_side:
        return None
    # NumPy reuses freed memory, while a bytes object of this size is newly allocated by the system.
    content = np.empty(stride * height, np.uint8)
    length = os.preadv(descriptor, [content], strips[0] + stride * row)
    if length < content.size:
        raise OSError(f'{path}: ends within row {row + length // stride}')
    pixels = content.view(dtype).reshape(height, header.width, header.bands)
    return pixels[:, col : col + width]


class _Tags:
    """First directory of tags of a TIFF file."""

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
        self._raw = self._bytes(start + 2, 12 * count + 4)
        self._entries, self._spans = _entries_of(self._order, self._raw)
        self.used = start + 2 + 12 * count + 4

    def content(self) -> tuple[bytes, ...] | None:
        """Return all bytes that determine the header except its transform; None if it is long."""
        head = self._head
        if any(stop > len(head) for _, stop in self._spans):
            return None
        # The first bytes include the position of the directory, which determines
        # :attr:`Header.used`.
        return head[:8], self._raw, *[head[start:stop] for start, stop in self._spans]

    def __contains__(self, tag: int) -> bool:
        """Check whether a tag is present."""
        return tag in self._entries

    def get(self, tag: int, count: int | None = None) -> tuple[Any, ...]:
        """Return all values of a tag, or none if it is missing; check their number if given."""
        if tag not in self._entries:
            return ()
        kind, number, inline = self._entries[tag]
        if number == 0 or count not in (None, number):
            raise NotPlainError(f'tag {tag} has {number} values')
        code = f'{number}{_FORMATS[kind]}'
        size = struct.calcsize('=' + code)
        if size > _MOST_BYTES:
            raise NotPlainError(f'tag of {size} bytes')
        if size > 4:
            (position,) = struct.unpack(self._order + 'I', inline)
            self.used = max(self.used, position + size)
            return self._unpack(code, position)
        return struct.unpack_from(self._order + code, inline)

    def integer(self, tag: int, default: int | None = None) -> int:
        """Return the only value of a tag."""
        value = next(iter(self.get(tag, 1)), default)
        if value is None:
            raise NotPlainError(f'no tag {tag}')
        return int(value)

    def same(self, tag: int, count: int, default: int) -> int:
        """Return the value of a tag that is equal for all bands."""
        values = set(self.get(tag, count)) or {default}
        if len(values) != 1:
            raise NotPlainError(f'bands differ in tag {tag}')
        return int(values.pop())

    def text(self, tag: int) -> bytes:
        """Return the text of a tag."""
        (text,) = self.get(tag) or (b'',)
        return bytes(text)

    def _unpack(self, code: str, position: int) -> tuple[Any, ...]:
        """Unpack values at a position of the file."""
        content = self._bytes(position, struct.calcsize('=' + code))
        return struct.unpack(self._order + code, content)

    def _bytes(self, position: int, size: int) -> bytes:
        """Return bytes at a position of the file, or fewer at its end."""
        if position + size <= len(self._head):
            return self._head[position : position + size]
        return os.pread(self._descriptor, size, position)


@lru_cache(maxsize=256)
def _entries_of(order: str, raw: bytes) -> tuple[dict[int, tuple[Any, ...]], list[tuple[int, int]]]:
    """Return the entries of a directory, and the ranges of longer values except transforms."""
    count = len(raw) // 12
    *entries, following = struct.unpack(order + 'HHI4s' * count + 'I', raw)
    if following:
        raise NotPlainError('a mask, or overviews')
    if any(low >= high for low, high in zip(entries[:-4:4], entries[4::4], strict=True)):
        raise NotPlainError('tags out of order')
    found = {entries[i]: tuple(entries[i + 1 : i + 4]) for i in range(0, 4 * count, 4)}
    spans = []
    for tag, (kind, number, inline) in found.items():
        if kind not in _TYPES.get(tag, ()):
            raise NotPlainError(f'tag {tag} of type {kind}')
        size = number * struct.calcsize('=' + _FORMATS[kind])
        if size > 4 and tag not in (_PIXEL_SCALE, _TIEPOINTS, _MATRIX):
            (start,) = struct.unpack(order + 'I', inline)
            spans.append((start, start + size))
    return found, spans


def _header(tags: _Tags, measure: bool) -> Header:
    """Make a header from the tags of a file."""
    width, height, bands = tags.integer(_WIDTH), tags.integer(_HEIGHT), tags.integer(_BANDS, 1)
    if not 0 < width < 1 << 31 or not 0 < height < 1 << 31 or not bands:
        raise NotPlainError('no pixels')
    colours = {1: 1, 2: 3}.get(tags.integer(_PHOTOMETRIC), 0)
    extra = tags.get(_EXTRA, bands - colours) if bands != colours else ()
    if not 0 < colours <= bands or any(extra) or (bands == colours) != (_EXTRA not in tags):
        raise NotPlainError('colour bands')
    kind = _KINDS.get(tags.same(_SAMPLE_FORMAT, bands, 1), '')
    dtype = f'{kind}{tags.same(_BITS, bands, 1)}'
    if dtype not in ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float32', 'float64'):
        raise NotPlainError(f'pixels of type {dtype}')
    compression, planar = tags.integer(_COMPRESSION, 1), tags.integer(_PLANAR, 1)
    predictor = tags.integer(_PREDICTOR, 1)
    if compression not in _COMPRESSIONS or planar not in (1, 2) or predictor not in (1, 2, 3):
        raise NotPlainError('unusual compression or interleaving')
    planes = bands if planar == 2 else 1
    tiled = _TILE_OFFSETS in tags
    if tiled:
        rows, cols = tags.integer(_TILE_HEIGHT), tags.integer(_TILE_WIDTH)
        if not rows or not cols or rows % 16 or cols % 16 or _STRIP_OFFSETS in tags:
            raise NotPlainError('unusual tile size')
    else:
        rows, cols = min(tags.integer(_ROWS_PER_STRIP, height), height), width
        if not rows or _TILE_WIDTH in tags or _TILE_HEIGHT in tags:
            raise NotPlainError('strips of no rows')
    blocks = -(-height // rows) * -(-width // cols) * planes
    offsets = tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS, blocks)
    sizes = tags.get(_TILE_SIZES if tiled else _STRIP_SIZES, blocks)
    if not offsets or not sizes:
        raise NotPlainError('no strip or tile offsets')
    stated = sizes
    plain = not tiled and compression == 1 and planes == 1
    if compression == 1 and not tiled:
        row = width * (bands // planes) * np.dtype(dtype).itemsize
        strips = -(-height // rows)
        last = height - (strips - 1) * rows
        needed = ((rows * row,) * (strips - 1) + (last * row,)) * planes
        if 0 in offsets:
            # A strip with offset 0 is missing in a sparse file.
            needed = tuple(n if at else 0 for n, at in zip(needed, offsets, strict=True))
        # The sizes in the file may be wrong, but the sizes of uncompressed strips are known.
        plain &= sizes == needed
        sizes = needed
    if b'role' in tags.text(_METADATA):
        raise NotPlainError('bands with names, scale or offset')
    epsg, transform, nodata = _epsg(tags), _transform(tags), _nodata(tags, np.dtype(dtype))
    end = used = 0
    if measure:
        end = max(map(operator.add, offsets, sizes))
        used = max(end, max(map(operator.add, offsets, stated)), tags.used)
    return Header(
        width,
        height,
        bands,
        dtype,
        epsg,
        transform,
        nodata,
        end=end,
        used=used,
        strips=offsets if plain else None,
        rows_per_strip=rows if plain else 0,
        side_by_side=plain
        and all(map(operator.eq, offsets[1:], map(operator.add, offsets, sizes))),
        big_endian=tags.big_endian,
    )


def _epsg(tags: _Tags) -> int | None:
    """Return the EPSG code of the CRS."""
    keys = tags.get(_GEO_KEYS)
    if len(keys) < 4:
        raise NotPlainError('no CRS')
    # Whether PixelIsPoint shifts the grid by half a pixel depends on an option of GDAL.
    types = [keys[i + 3] for i in range(4, len(keys) - 3, 4) if keys[i] == _RASTER_TYPE]
    if types not in ([], [1]):
        raise NotPlainError('PixelIsPoint')
    return _meaning(keys, tags.get(_GEO_DOUBLES), tags.text(_GEO_TEXT))


@lru_cache(maxsize=1024)
def _meaning(keys: tuple[int, ...], doubles: tuple[float, ...], text: bytes) -> int | None:
    """Return the EPSG code that GDAL decodes from the geokeys of a file."""
    shorts = struct.pack(f'<{len(keys)}H', *keys)
    values = {
        **{tag: (_SHORT, 1, struct.pack('<H', 1)) for tag in (_WIDTH, _HEIGHT, _COMPRESSION)},
        _BITS: (_SHORT, 1, struct.pack('<H', 8)),
        _PHOTOMETRIC: (_SHORT, 1, struct.pack('<H', 1)),
        _STRIP_OFFSETS: (_LONG, 1, struct.pack('<I', 8)),
        _BANDS: (_SHORT, 1, struct.pack('<H', 1)),
        _ROWS_PER_STRIP: (_SHORT, 1, struct.pack('<H', 1)),
        _STRIP_SIZES: (_LONG, 1, struct.pack('<I', 1)),
        _PIXEL_SCALE: (_DOUBLE, 3, struct.pack('<3d', 1, 1, 0)),
        _TIEPOINTS: (_DOUBLE, 6, struct.pack('<6d', 0, 0, 0, 1, 1, 0)),
        _GEO_KEYS: (_SHORT, len(keys), shorts),
        **({_GEO_DOUBLES: (_DOUBLE, len(doubles), _doubles(doubles))} if doubles else {}),
        **({_GEO_TEXT: (_TEXT, len(text), text)} if text else {}),
    }
    # Write a TIFF with a pixel of one byte at offset 8, then the directory, then longer values.
    start, entries, rest = 10, b'', b''
    after = start + 2 + 12 * len(values) + 4
    for tag, (kind, count, content) in sorted(values.items()):
        if len(content) > 4:
            place = struct.pack('<I', after + len(rest))
            rest += content + b'\0' * (len(content) % 2)
        else:
            place = content.ljust(4, b'\0')
        entries += struct.pack('<HHI', tag, kind, count) + place
    head = struct.pack('<4sI2xH', b'II*\0', start, len(values))
    with MemoryFile(head + entries + bytes(4) + rest) as memory, memory.open() as src:
        return src.crs.to_epsg() if src.crs else None


def _doubles(values: tuple[float, ...]) -> bytes:
    """Encode numbers as in a file."""
    return struct.pack(f'<{len(values)}d', *values)


def _transform(tags: _Tags) -> tuple[float, ...]:
    """Return the affine coefficients."""
    scale, ties, matrix = tags.get(_PIXEL_SCALE), tags.get(_TIEPOINTS), tags.get(_MATRIX)
    if not all(map(math.isfinite, (*scale, *ties, *matrix))):
        raise NotPlainError('no affine transform')
    if len(scale) == 3 and len(ties) == 6 and not matrix and min(scale[:2]) > 0:
        a, e = scale[0], -scale[1]
        return a, 0.0, ties[3] - ties[0] * a, 0.0, e, ties[4] - ties[1] * e
    if len(matrix) == 16 and not scale and not ties:
        return (*matrix[0:2], matrix[3], *matrix[4:6], matrix[7])
    raise NotPlainError('no affine transform')


def _nodata(tags: _Tags, dtype: np.dtype[Any]) -> float | None:
    """Return the nodata value."""
    if _NODATA not in tags:
        return None
    text = tags.text(_NODATA).partition(b'\0')[0].rstrip(b' ')
    if not _NUMBER.fullmatch(text):
        raise NotPlainError(f'nodata {text!r}')
    value = float(text)
    if dtype.kind != 'f':
        limits = np.iinfo(dtype)
        if not value.is_integer() or not limits.min <= value <= limits.max:
            raise NotPlainError(f'nodata {value} of {dtype}')
    elif value == value and float(dtype.type(value)) != value:
        raise NotPlainError(f'nodata {value} of {dtype}')
    return value


def header_of(src: DatasetReader) -> Header:
    """Return the header of an open raster.

    Args:
        src: Open raster.

    Returns:
        The header.

    Raises:
        RasterioError: If its bands have different data types.
    """
    if len(set(src.dtypes)) != 1:
        raise RasterioError(f'{src.name}: bands have different data types')
    return Header(
        src.width,
        src.height,
        src.count,
        src.dtypes[0],
        src.crs.to_epsg() if src.crs else None,
        tuple(Affine(*src.transform[:6]))[:6],
        src.nodata,
    )
