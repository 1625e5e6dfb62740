"""A STAC item with Sentinel-1 and Sentinel-2 assets, as rasters to map."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree as ET

import rasterio
from rasterio.errors import RasterioIOError
from rasterio.transform import Affine

from geofm.atomic import atomic_file
from geofm.grid import ALIGNMENT_TOLERANCE, Grid
from geofm.maps.scene import SensorRaster
from geofm.sensor_rasters import band_name
from geofm.sensors import SENSORS, Sensor

#: Sentinel-2 bands by the names that the EO extension and the Earth Search catalogue give them.
_COMMON_NAMES = {
    'coastal': 'B01',
    'blue': 'B02',
    'green': 'B03',
    'red': 'B04',
    'rededge1': 'B05',
    'rededge2': 'B06',
    'rededge3': 'B07',
    'rededge071': 'B05',
    'rededge075': 'B06',
    'rededge078': 'B07',
    'nir': 'B08',
    'nir08': 'B8A',
    'nir09': 'B09',
    'cirrus': 'B10',
    'swir16': 'B11',
    'swir22': 'B12',
}

# Names of pixel types in a virtual raster.
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


class _Source(NamedTuple):
    """Where a band of a sensor is."""

    band: str
    path: Path
    number: int


@dataclass(frozen=True)
class Item:
    """Rasters of a STAC item.

    Attributes:
        s1: Sentinel-1 raster, if the item has one.
        s2: Sentinel-2 raster, if the item has one.
        dates: Day of acquisition, YYYY-MM-DD, by sensor, where the item says.
    """

    s1: Path | None
    s2: Path | None
    dates: Mapping[str, str]


def read_item(path: Path, folder: Path) -> Item:
    """Find Sentinel-1 and Sentinel-2 in a STAC item, without any network.

    Bands are told by the names of their assets or in ``eo:bands`` or ``bands`` of these: 'B8A',
    'vv', or common names such as 'red' and 'nir08'. Assets that hold no band of the sensors are
    left alone, and so are true-colour pictures and others with the role 'overview', 'thumbnail',
    'visual' or 'metadata'. Bands in several files, or without names of their own, are put together
    as a GDAL virtual raster, on the finest grid among them; coarser ones are then interpolated.

    Args:
        path: JSON of the item. Its assets must be local files, by relative path, absolute path
            or ``file:`` address.
        folder: Folder for virtual rasters ``<item>_<sensor>.vrt``; made if it is needed.

    Returns:
        The rasters.

    Raises:
        FileNotFoundError: If the item or an asset is missing.
        ValueError: If it is no STAC item, has no band of either sensor, an asset is not local, two
            assets hold the same band, or the files of a sensor do not lie on one another.
    """
    item = _load(path)
    found: dict[str, dict[str, _Source]] = {key: {} for key in SENSORS}
    dates: dict[str, str] = {}
    for name, asset in item['assets'].items():
        if {'overview', 'thumbnail', 'visual', 'metadata'} & set(asset.get('roles', ())):
            continue
        for key, sensor in SENSORS.items():
            sources = _bands_of(name, asset, sensor, path)
            if twice := sorted(set(found[key]) & {source.band for source in sources}):
                raise ValueError(f'{path}: several assets hold {twice} of {sensor.title}')
            found[key] |= {source.band: source for source in sources}
            day = _day(asset) or _day(item.get('properties', {}))
            if sources and day:
                dates[key] = day
    if not any(found.values()):
        raise ValueError(
            f'{path}: no asset has a band of {" or ".join(s.title for s in SENSORS.values())}; '
            f'the assets are {list(item["assets"])}'
        )
    name = str(item.get('id', path.stem)).replace('/', '_')
    rasters = {
        key: _stack(list(sources.values()), folder / f'{name}_{key}.vrt') if sources else None
        for key, sources in found.items()
    }
    return Item(rasters['s1'], rasters['s2'], dates)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file (given as the STAC item)')
    try:
        item = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path}: no JSON: {error}') from error
    if not isinstance(item, dict) or not isinstance(item.get('assets'), dict):
        raise ValueError(f'{path}: no STAC item: it has no assets')
    return item


def _day(properties: Mapping[str, Any]) -> str | None:
    text = properties.get('datetime') or properties.get('start_datetime')
    return str(text)[:10] if text else None


def _bands_of(name: str, asset: Mapping[str, Any], sensor: Sensor, item: Path) -> list[_Source]:
    """Bands of a sensor in an asset."""
    described = asset.get('eo:bands') or asset.get('bands') or []
    names = [_band(entry, sensor) for entry in described]
    if not any(names) and len(described) <= 1:
        names = [_band({'name': name}, sensor)]
    if not any(names) and not described and _is_sensor(name, sensor):
        # The whole sensor in one file that says itself what its bands are, or has all of them.
        return _own_bands(_local(asset, item), sensor)
    known = [(band, index) for index, band in enumerate(names, start=1) if band]
    # Three bands of a picture for people have common names, too.
    if not known or name.lower() in ('visual', 'preview', 'thumbnail'):
        return []
    path = _local(asset, item)
    return [_Source(band, path, index) for band, index in known]


def _is_sensor(name: str, sensor: Sensor) -> bool:
    """Whether an asset is called after a sensor: 'S2', 's1_grd', 'Sentinel-2 L2A'."""
    pattern = rf'(s|sentinel[-_ ]?){sensor.name[1:]}([^0-9].*)?'
    return re.fullmatch(pattern, name, re.IGNORECASE) is not None


def _band(entry: Mapping[str, Any], sensor: Sensor) -> str | None:
    """Name of a band in an entry of ``eo:bands`` or ``bands``."""
    for key in ('name', 'common_name', 'eo:common_name'):
        text = str(entry.get(key, ''))
        band = band_name(text, sensor) or _COMMON_NAMES.get(text.lower())
        if band in sensor.band_names:
            return band
    return None


def _own_bands(path: Path, sensor: Sensor) -> list[_Source]:
    raster = SensorRaster.open(path, sensor)
    raster.src.close()
    return [_Source(band, path, index + 1) for band, index in raster.bands.items()]


def _local(asset: Mapping[str, Any], item: Path) -> Path:
    href = str(asset.get('href', ''))
    url = urlparse(href)
    if url.scheme not in ('', 'file'):
        raise ValueError(f'{item}: the asset {href} is not a local file; fetch it first')
    path = item.parent / (unquote(url.path) if url.scheme else href)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file (an asset of {item})')
    return path.resolve()


class _Layer(NamedTuple):
    """A band of a virtual raster, and what is to be known of its file."""

    source: _Source
    grid: Grid
    dtype: str
    nodata: float | None


def _stack(sources: Sequence[_Source], vrt: Path) -> Path:
    """Write bands as a GDAL virtual raster on the finest of their grids."""
    layers = []
    for source in sources:
        try:
            with rasterio.open(source.path) as src:
                if source.number > src.count:
                    raise ValueError(
                        f'{source.path}: {src.count} bands, but the item says that band '
                        f'{source.number} is {source.band}'
                    )
                kind, nodata = src.dtypes[source.number - 1], src.nodatavals[source.number - 1]
                layers.append(_Layer(source, Grid.of(src), kind, nodata))
        except RasterioIOError as error:
            raise ValueError(f'{source.path}: GDAL cannot read this raster: {error}') from error
    grid = min((layer.grid for layer in layers), key=lambda grid: grid.res[0] * grid.res[1])
    root = ET.Element('VRTDataset', rasterXSize=str(grid.width), rasterYSize=str(grid.height))
    ET.SubElement(root, 'SRS').text = grid.crs.to_wkt()
    ET.SubElement(root, 'GeoTransform').text = ', '.join(map(repr, grid.transform.to_gdal()))
    for number, layer in enumerate(layers, start=1):
        root.append(_band_element(layer, number, grid))
    content = ET.tostring(root)
    # A file that is there already keeps its time, by which a run that was killed knows its input.
    if not vrt.is_file() or vrt.read_bytes() != content:
        with atomic_file(vrt) as part:
            part.write_bytes(content)
    return vrt


def _band_element(layer: _Layer, number: int, grid: Grid) -> ET.Element:
    source, own = layer.source, layer.grid
    element = ET.Element('VRTRasterBand', dataType=_GDAL_TYPES[layer.dtype], band=str(number))
    ET.SubElement(element, 'Description').text = source.band
    if layer.nodata is not None:
        ET.SubElement(element, 'NoDataValue').text = repr(layer.nodata)
    left, top, width, height = _rectangle(own, grid, source.path)
    # With nodata, interpolation must not take it for a value.
    complex_source = layer.nodata is not None
    simple = ET.SubElement(element, 'ComplexSource' if complex_source else 'SimpleSource')
    if (width, height) != (own.width, own.height):
        simple.set('resampling', 'bilinear')
    ET.SubElement(simple, 'SourceFilename', relativeToVRT='0').text = str(source.path)
    ET.SubElement(simple, 'SourceBand').text = str(source.number)
    sizes = {'xSize': own.width, 'ySize': own.height}
    _rect(simple, 'SrcRect', {'xOff': 0, 'yOff': 0, **sizes})
    _rect(simple, 'DstRect', {'xOff': left, 'yOff': top, 'xSize': width, 'ySize': height})
    if complex_source:
        ET.SubElement(simple, 'NODATA').text = repr(layer.nodata)
    return element


def _rect(parent: ET.Element, name: str, sides: Mapping[str, float]) -> None:
    ET.SubElement(parent, name, {key: repr(value) for key, value in sides.items()})


def _rectangle(own: Grid, grid: Grid, path: Path) -> tuple[float, float, float, float]:
    """Left, top, width and height of a raster in pixels of a grid of the same directions."""
    to_grid: Affine = ~grid.transform @ own.transform
    turned = max(abs(to_grid.b) * own.height, abs(to_grid.d) * own.width)
    if own.crs != grid.crs or turned > ALIGNMENT_TOLERANCE or min(to_grid.a, to_grid.e) <= 0:
        raise ValueError(
            f'{path}: another CRS or direction than the other bands of its sensor; bring them onto '
            'one grid first, e.g. with `rio warp --like`'
        )
    sides = to_grid.c, to_grid.f, to_grid.a * own.width, to_grid.e * own.height
    whole = [float(round(side)) for side in sides]
    near = all(abs(a - b) < ALIGNMENT_TOLERANCE for a, b in zip(sides, whole, strict=True))
    left, top, width, height = whole if near else sides
    return left, top, width, height
