"""Reading the rasters of a STAC item, to map them."""

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree as ET

import numpy as np
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.atomic import atomic_file
from geofm.grid import ALIGNMENT_TOLERANCE, Grid, own_mask
from geofm.maps.scene.placement import Placement
from geofm.maps.scene.scene import SensorRaster
from geofm.printing import counted, warn
from geofm.rasters import open_raster
from geofm.sensor_rasters import band_name
from geofm.sensors import (
    DEFAULT_SENSORS,
    SENSORS,
    Sensor,
    bands_of,
    check_bands,
    sensor_channels,
    sensor_of,
)
from geofm.stac_assets import (
    NO_DATA_ROLES,
    PICTURES,
    Scaling,
    scaling_of,
    without_baseline_offset,
)

#: Names of data types in a virtual raster.
_GDAL_TYPES = {
    'uint8': 'Byte',
    'int8': 'Int8',
    'uint16': 'UInt16',
    'int16': 'Int16',
    'uint32': 'UInt32',
    'int32': 'Int32',
    'float16': 'Float16',
    'float32': 'Float32',
    'float64': 'Float64',
}

#: Nodata values by kind of data type, for files with a mask but no nodata value.
_FILLS = {'u': 65535.0, 'i': -32768.0, 'f': math.nan}


class _Source(NamedTuple):
    """A band of a sensor in a local file."""

    band: str
    path: Path
    number: int
    scaling: Scaling


class _Candidate(NamedTuple):
    """A band of an asset, whose file may be missing."""

    band: str
    asset: Mapping[str, Any]
    number: int


@dataclass(frozen=True)
class Item:
    """Rasters of a STAC item.

    Attributes:
        files: Raster of each sensor of the item, by key.
        dates: Day of acquisition as YYYY-MM-DD, by sensor, for sensors with a date.
    """

    files: Mapping[str, Path]
    dates: Mapping[str, str]

    @property
    def s1(self) -> Path | None:
        """Sentinel-1 raster, if the item has one."""
        return self.files.get(DEFAULT_SENSORS[0])

    @property
    def s2(self) -> Path | None:
        """Sentinel-2 raster, if the item has one."""
        return self.files.get(DEFAULT_SENSORS[1])


def read_item(path: Path, folder: Path, bands: Sequence[str] | None = None) -> Item:
    """Find the rasters of sensors in a STAC item. The network is not used.

    Bands are identified by the name of their asset or by its ``eo:bands`` or ``bands``: 'B8A',
    'vv', or common names such as 'red' and 'nir08'. Assets without a band of the sensors are
    ignored, as are true-colour images and other assets with the role 'overview', 'thumbnail',
    'visual' or 'metadata'. If several assets have the same band, the local file with the finest
    pixels is used. A band without a local file is left out, with a warning. The bands of a sensor
    are combined in a GDAL virtual raster on the finest grid among them, onto which coarser bands
    are interpolated.

    The scale, offset, unit and nodata value of the item (``raster:bands``, ``bands``, or fields of
    an asset) are written to the virtual raster. If the item has no offset and its processing
    baseline is 04.00 or later, 1,000 is subtracted from the DN of Sentinel-2
    (:attr:`geofm.sensors.Sensor.baseline_offset`). If a property ``...:boa_offset_applied`` says
    that the offset was already applied, none is applied.

    Args:
        path: JSON file of the item. Its assets must be local files, given by a relative path, an
            absolute path or a ``file:`` URL.
        folder: Folder for virtual rasters ``<item>_<sensor>.vrt``. It is created when needed.
        bands: Bands that are needed. Other bands, and sensors without any of these bands, are
            ignored. Default: the bands of Sentinel-1 and Sentinel-2 Level-1C.

    Returns:
        The rasters.

    Raises:
        FileNotFoundError: If the item, or the only file with a band, does not exist.
        ValueError: If the file is not a STAC item or is malformed, if no local file has a band of
            these sensors, or if the files of a sensor cannot be stacked.
    """
    item = _load(path)
    wanted = bands_of(DEFAULT_SENSORS) if bands is None else check_bands(bands)
    sensors = {key: SENSORS[key] for key in sensor_channels(wanted)}
    candidates: dict[str, list[_Candidate]] = {key: [] for key in sensors}
    dates: dict[str, str] = {}
    problems: dict[str, Exception] = {}
    for name, asset in item['assets'].items():
        if NO_DATA_ROLES & set(asset.get('roles') or ()):
            continue
        for key, sensor in sensors.items():
            try:
                found = _bands_of(name, asset, sensor, path)
            except (OSError, ValueError) as error:
                problems[name] = error
                continue
            found = [candidate for candidate in found if candidate.band in wanted]
            candidates[key] += found
            day = _day(asset, path) or _day(item['properties'], path)
            if found and day:
                dates[key] = day
    sources = {key: _choose(found, item, path, problems) for key, found in candidates.items()}
    if not any(sources.values()):
        if problems:
            raise next(iter(problems.values()))
        raise ValueError(
            f'{path}: no asset has a band of {" or ".join(s.title for s in sensors.values())}; '
            f'the assets are {list(item["assets"])}'
        )
    for name, problem in problems.items():
        warn(f'{name} is left out: {problem}')
    name = re.sub(r'[^\w.-]', '_', str(item.get('id') or path.stem))[:100]
    files = {
        key: _stack(found, folder / f'{name}_{key}.vrt') for key, found in sources.items() if found
    }
    return Item(files, {key: dates[key] for key in dates if key in files})


def _load(path: Path) -> dict[str, Any]:
    """Read an item, and check the types of the fields that are used."""
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file (given as the STAC item)')
    try:
        item = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON: {error}') from error
    kind = item.get('type') if isinstance(item, dict) else None
    if kind in ('FeatureCollection', 'Collection', 'Catalog'):
        raise ValueError(f'{path}: not a STAC item but a {kind}: give one item')
    if not isinstance(item, dict) or not isinstance(item.get('assets'), dict):
        raise ValueError(f'{path}: not a STAC item: it has no assets, or they are not an object')
    item['properties'] = item.get('properties') or {}
    _check(item['properties'], dict, 'properties', path)
    for name, asset in item['assets'].items():
        _check(asset, dict, f'the asset {name!r}', path)
        for key in ('eo:bands', 'bands', 'raster:bands'):
            entries = asset.get(key) or []
            _check(entries, list, f'{key} of the asset {name!r}', path)
            for entry in entries:
                _check(entry, dict, f'an entry of {key} of the asset {name!r}', path)
        roles = asset.get('roles') or []
        _check(roles, list, f'roles of the asset {name!r}', path)
        for role in roles:
            _check(role, str, f'a role of the asset {name!r}', path)
    return item


def _check(value: Any, kind: type, what: str, path: Path) -> None:
    if not isinstance(value, kind):
        wanted = {'dict': 'object', 'list': 'array', 'str': 'string'}[kind.__name__]
        raise ValueError(f'{path}: malformed STAC item: {what} must be a JSON {wanted}')


def _day(properties: Mapping[str, Any], item: Path) -> str | None:
    value = properties.get('datetime') or properties.get('start_datetime')
    if not value:
        return None
    try:
        return datetime.date.fromisoformat(str(value)[:10]).isoformat()
    except ValueError as error:
        raise ValueError(
            f'{item}: malformed STAC item: {value!r} is not a date and time'
        ) from error


def _bands_of(name: str, asset: Mapping[str, Any], sensor: Sensor, item: Path) -> list[_Candidate]:
    """Return the bands of a sensor in an asset."""
    described = asset.get('eo:bands') or asset.get('bands') or []
    names = [_band(entry, sensor) for entry in described]
    if not any(names) and len(described) <= 1:
        names = [_band({'name': name}, sensor)]
    if not any(names) and not described and _is_sensor(name, sensor):
        # One file for the whole sensor: its band descriptions or their number identify the bands.
        return _own_bands(asset, item, sensor)
    known = [(band, index) for index, band in enumerate(names, start=1) if band]
    # The bands of a true-colour image have common names, too.
    if not known or name.lower() in PICTURES:
        return []
    return [_Candidate(band, asset, index) for band, index in known]


def _is_sensor(name: str, sensor: Sensor) -> bool:
    """Whether an asset is named after a sensor, e.g. 'S2', 's1_grd' or 'Sentinel-2 L2A'."""
    compact = re.sub(r'[-_ ]', '', name.lower())
    known = (sensor.name, sensor.short_title.lower())
    return any(
        re.fullmatch(rf'{re.escape(re.sub("[-_ ]", "", text))}([^0-9].*)?', compact) is not None
        for text in known
    )


def _band(entry: Mapping[str, Any], sensor: Sensor) -> str | None:
    """Return the name of the band that an entry of ``eo:bands`` or ``bands`` describes."""
    for key in ('name', 'common_name', 'eo:common_name'):
        text = str(entry.get(key, ''))
        # Earth Search calls the JPEG 2000 twin of 'red' 'red-jp2'.
        common = text.lower().removesuffix('-jp2')
        band = band_name(text, sensor) or sensor.find_band(common)
        if band is not None:
            return band
    return None


def _own_bands(asset: Mapping[str, Any], item: Path, sensor: Sensor) -> list[_Candidate]:
    raster = SensorRaster.open(_local(asset, item), sensor)
    raster.src.close()
    return [_Candidate(band, asset, index + 1) for band, index in raster.bands.items()]


def _local(asset: Mapping[str, Any], item: Path) -> Path:
    href = asset.get('href')
    if not isinstance(href, str) or not href or '\0' in href:
        raise ValueError(f'{item}: malformed STAC item: an asset has the href {href!r}')
    try:
        url = urlparse(href)
        path = item.parent / (unquote(url.path) if url.scheme else href)
        if url.scheme in ('', 'file') and not path.is_file():
            raise FileNotFoundError(f'{path}: no such file (an asset of {item})')
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f'{item}: malformed STAC item: href {href[:100]!r}: {error}') from error
    if url.scheme not in ('', 'file'):
        raise ValueError(f'{item}: the asset {href} is not a local file; fetch it first')
    return path.resolve()


# -- files --------------------------------------------------------------------------------------


def _choose(
    candidates: Sequence[_Candidate],
    item: Mapping[str, Any],
    path: Path,
    problems: dict[str, Exception],
) -> list['_Layer']:
    """Open the local file with the finest pixels for each band."""
    layers: dict[str, _Layer] = {}
    failed: dict[str, Exception] = {}
    for band, asset, number in candidates:
        try:
            scaling = scaling_of(asset, number)
        except ValueError as error:
            raise ValueError(f'{path}: malformed STAC item: {error}') from error
        try:
            layer = _open_layer(_Source(band, _local(asset, path), number, scaling), item)
        except (OSError, ValueError) as error:
            failed.setdefault(band, error)
            continue
        best = layers.get(band)
        if best is None or layer.pixel < (1 - ALIGNMENT_TOLERANCE) * best.pixel:
            layers[band] = layer
        elif best.source.path != layer.source.path and math.isclose(
            layer.pixel, best.pixel, rel_tol=ALIGNMENT_TOLERANCE
        ):
            warn(f'{path}: several assets have {band}; {best.source.path} is used')
    problems |= {band: error for band, error in failed.items() if band not in layers}
    return list(layers.values())


class _Layer(NamedTuple):
    """A band of a virtual raster, and the properties of its file."""

    source: _Source
    placement: Placement
    dtype: str
    nodata: float | None
    masked: bool

    @property
    def grid(self) -> Grid:
        """Grid of the file."""
        return self.placement.grid

    @property
    def pixel(self) -> float:
        """Area of a pixel in units of the CRS."""
        return self.grid.res[0] * self.grid.res[1]


def _open_layer(source: _Source, item: Mapping[str, Any]) -> _Layer:
    with open_raster(source.path) as src:
        if source.number > src.count:
            raise ValueError(
                f'{source.path}: {counted(src.count, "band")}, but the item says that band '
                f'{source.number} is {source.band}'
            )
        index = source.number - 1
        scale, offset = src.scales[index], src.offsets[index]
        states = (scale, offset) != (1, 0)
        own = Scaling(scale, offset) if states else Scaling()
        scaling = source.scaling
        sensor = sensor_of(source.band)
        if sensor.unit == 'DN':
            # The item's scale and offset are used if it has any, otherwise the file's, otherwise
            # those of the baseline.
            scaling = scaling._replace(
                scale=own.scale if scaling.scale is None else scaling.scale,
                offset=own.offset if scaling.offset is None else scaling.offset,
            )
            name, properties = str(item.get('id')), item['properties']
            scaling = without_baseline_offset(scaling, sensor, name, properties)
        elif scaling.scale is None and scaling.offset is None:
            scaling = scaling._replace(scale=own.scale, offset=own.offset)
        scaling = scaling._replace(unit=scaling.unit or src.units[index])
        dtype, nodata = src.dtypes[index], src.nodatavals[index]
        masked = own_mask(src, [index], Window(0, 0, 1, 1)) is not None
        if masked and nodata is None:
            if np.dtype(dtype).itemsize == 1:
                # All 256 values may be valid: a wider type has room for a nodata value.
                dtype = 'int16'
            nodata = _FILLS[np.dtype(dtype).kind]
        nodata = scaling.nodata if nodata is None else nodata
        return _Layer(source._replace(scaling=scaling), Placement.of(src), dtype, nodata, masked)


def _stack(layers: Sequence[_Layer], vrt: Path) -> Path:
    """Write bands as a GDAL virtual raster on the finest of their grids."""
    finest = min(layers, key=lambda layer: layer.pixel)
    height, width = finest.placement.shape
    root = ET.Element('VRTDataset', rasterXSize=str(width), rasterYSize=str(height))
    if finest.placement.is_regular:
        ET.SubElement(root, 'SRS').text = finest.grid.crs.to_wkt()
        transform = ', '.join(map(repr, finest.grid.transform.to_gdal()))
        ET.SubElement(root, 'GeoTransform').text = transform
    else:
        _add_points(root, finest.placement)
    # A band without a scale is in DN. It needs a scale if other bands are in reflectance.
    reflectance = any((layer.source.scaling.scale or 1) < 1 for layer in layers)
    for number, layer in enumerate(layers, start=1):
        root.append(_band_element(layer, number, finest, reflectance))
    content = ET.tostring(root)
    # An unchanged file is not rewritten: a resumed run compares the modification time of its input.
    if not vrt.is_file() or vrt.read_bytes() != content:
        with atomic_file(vrt) as temporary:
            temporary.write_bytes(content)
    return vrt


def _add_points(root: ET.Element, placement: Placement) -> None:
    assert placement.gcp_crs is not None
    points = ET.SubElement(root, 'GCPList', Projection=placement.gcp_crs.to_wkt())
    for i, point in enumerate(placement.gcps):
        places = {'Pixel': point.col, 'Line': point.row, 'X': point.x, 'Y': point.y, 'Z': point.z}
        texts = {key: repr(float(value or 0)) for key, value in places.items()}
        ET.SubElement(points, 'GCP', {'Id': str(i), **texts})


def _band_element(layer: _Layer, number: int, finest: _Layer, reflectance: bool) -> ET.Element:
    source = layer.source
    height, width = layer.placement.shape
    element = ET.Element('VRTRasterBand', dataType=_GDAL_TYPES[layer.dtype], band=str(number))
    ET.SubElement(element, 'Description').text = source.band
    if layer.nodata is not None:
        ET.SubElement(element, 'NoDataValue').text = repr(layer.nodata)
    scale, offset, unit, _ = source.scaling
    sensor = sensor_of(source.band)
    if scale is None and reflectance:
        scale = sensor.scale
        offset = sensor.offset or None if offset is None else offset
    for name, value in (('UnitType', unit), ('Offset', offset), ('Scale', scale)):
        if value is not None:
            ET.SubElement(element, name).text = value if isinstance(value, str) else repr(value)
    left, top, across, down = _rectangle(layer, finest)
    # Only a complex source leaves nodata values out of the interpolation.
    complex_source = layer.nodata is not None
    simple = ET.SubElement(element, 'ComplexSource' if complex_source else 'SimpleSource')
    if (across, down) != (width, height):
        simple.set('resampling', 'bilinear')
    ET.SubElement(simple, 'SourceFilename', relativeToVRT='0').text = str(source.path)
    ET.SubElement(simple, 'SourceBand').text = str(source.number)
    _rect(simple, 'SrcRect', {'xOff': 0, 'yOff': 0, 'xSize': width, 'ySize': height})
    _rect(simple, 'DstRect', {'xOff': left, 'yOff': top, 'xSize': across, 'ySize': down})
    if layer.masked:
        ET.SubElement(simple, 'UseMaskBand').text = 'true'
    elif complex_source:
        ET.SubElement(simple, 'NODATA').text = repr(layer.nodata)
    return element


def _rect(parent: ET.Element, name: str, sides: Mapping[str, float]) -> None:
    ET.SubElement(parent, name, {key: repr(value) for key, value in sides.items()})


def _rectangle(layer: _Layer, finest: _Layer) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a layer in pixels of the finest layer."""
    own, grid = layer.placement, finest.placement
    if not (own.is_regular and grid.is_regular):
        if not own.is_like(grid):
            raise ValueError(
                f'{layer.source.path}: its ground control points differ from those of the other '
                'bands of its sensor; warp them onto one grid first, e.g. with `rio warp`'
            )
        return 0, 0, own.shape[1], own.shape[0]
    to_grid: Affine = ~grid.grid.transform @ own.grid.transform
    height, width = own.shape
    turned = max(abs(to_grid.b) * height, abs(to_grid.d) * width)
    if (
        own.grid.crs != grid.grid.crs
        or turned > ALIGNMENT_TOLERANCE
        or min(to_grid.a, to_grid.e) <= 0
    ):
        raise ValueError(
            f'{layer.source.path}: its CRS or orientation differs from that of the other bands of '
            'its sensor; warp them onto one grid first, e.g. with `rio warp --like`'
        )
    sides = to_grid.c, to_grid.f, to_grid.a * width, to_grid.e * height
    whole = [float(round(side)) for side in sides]
    near = all(abs(a - b) < ALIGNMENT_TOLERANCE for a, b in zip(sides, whole, strict=True))
    left, top, across, down = whole if near else sides
    return left, top, across, down
