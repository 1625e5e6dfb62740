"""Make a table of the assets of STAC items."""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlparse

import pyarrow.parquet as pq
import pystac
from pystac.stac_io import DefaultStacIO

from geofm.datasets.table.error import TableError
from geofm.datasets.table.indexing import Indexed, make_table
from geofm.printing import counted, one_line, printable
from geofm.sensors import SENSORS, Sensor
from geofm.stac_assets import (
    Scaling,
    bands_in,
    holds_data,
    scaling_of,
    sensor_of_item,
    without_baseline_offset,
)
from geofm.suggestions import did_you_mean


def index_stac(path: str | Path, sensor: str | None = None) -> Indexed:
    """Make a table of the assets of STAC items, without network access.

    The sensor of an item is determined from its collection, constellation and similar properties.
    The bands of an item form a scene. Relative paths are resolved against the file of the item.

    Args:
        path: JSON file of an item, of a collection or catalogue (whose items are local files), or
            of an item collection; or a stac-geoparquet file.
        sensor: Key of the sensor of all items. Default: determined from each item.

    Returns:
        The table, and the number of items without a known sensor.

    Raises:
        TableError: If the file is not STAC, an item is malformed, a link of a catalogue is a URL,
            or no item has a known band.
    """
    file = Path(path)
    if not file.is_file():
        raise TableError(f'{printable(file)}: no such file (given as STAC)')
    if sensor is not None and sensor not in SENSORS:
        raise TableError(f"unknown sensor '{printable(sensor)}'{did_you_mean(sensor, SENSORS)}")
    rows: list[dict[str, Any]] = []
    others, example = 0, ''
    for item in _items(file):
        found = SENSORS[sensor] if sensor is not None else _sensor_of(item)
        new = [] if found is None else list(_rows(item, found, file))
        rows += new
        if not new:
            others, example = others + 1, example or item.id
    if not rows:
        raise TableError(
            f'{printable(file)}: no item has a band of a known sensor ({counted(others, "item")}, '
            f'e.g. {printable(example)}); known are {", ".join(SENSORS)}'
        )
    return Indexed(make_table(rows, printable(file), file.parent), others, example, 0, '')


class _LocalFiles(DefaultStacIO):
    """Reader of linked STAC files that refuses URLs: a file must not cause network access."""

    def read_text_from_href(self, href: str) -> str:
        """Read a local file."""
        if urlparse(href).scheme not in ('', 'file'):
            raise TableError(f'it links to {href}: only local files are read, so download it first')
        return super().read_text_from_href(href)


def _items(file: Path) -> Iterator[pystac.Item]:
    """Yield the items of a file."""
    try:
        if file.suffix.lower() in ('.parquet', '.geoparquet'):
            yield from (pystac.Item.from_dict(row) for row in _parquet_rows(file))
            return
        content = json.loads(file.read_text())
        kind = content.get('type') if isinstance(content, dict) else None
        if kind == 'FeatureCollection':
            items: Iterable[pystac.Item] = pystac.ItemCollection.from_dict(content).items
            for item in items:
                # Relative paths are resolved against the file.
                item.set_self_href(str(file))
                yield item
            return
        found = pystac.read_file(str(file.resolve()), stac_io=_LocalFiles())
        if isinstance(found, pystac.Item):
            yield found
        else:
            catalog = cast(pystac.Catalog, found)
            # The root of a published catalogue may be a URL.
            catalog.set_root(catalog)
            yield from catalog.get_items(recursive=True)
    except Exception as error:
        # pystac raises KeyError, TypeError and other errors for malformed content.
        cause = error.__cause__ if isinstance(error.__cause__, TableError) else error
        reason = printable(one_line(cause))
        raise TableError(f'{printable(file)}: cannot be read as STAC: {reason}') from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the items of a stac-geoparquet file as in JSON."""
    fields = ('id', 'type', 'stac_version', 'stac_extensions', 'collection', 'links', 'assets')
    with pq.ParquetFile(file) as stored:
        names = [name for name in stored.schema_arrow.names if name != 'geometry']
        for batch in stored.iter_batches(1 << 12, columns=names):
            for row in batch.to_pylist():
                item = {key: row[key] for key in fields if row.get(key) is not None}
                assets = row.get('assets') or {}
                item['assets'] = {
                    name: {k: v for k, v in asset.items() if v is not None}
                    for name, asset in assets.items()
                    if asset is not None
                }
                item |= {'type': 'Feature', 'geometry': None, 'links': []}
                item['properties'] = {
                    key: _plain(value)
                    for key, value in row.items()
                    if key not in (*fields, 'bbox') and value is not None
                }
                item.setdefault('stac_version', '1.0.0')
                yield item


def _plain(value: Any) -> Any:
    """Convert a value as in JSON."""
    return value.isoformat() if isinstance(value, datetime.datetime) else value


def _sensor_of(item: pystac.Item) -> Sensor | None:
    return sensor_of_item(item.id, item.collection_id, item.properties)


def _rows(item: pystac.Item, sensor: Sensor, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table for the assets of an item."""
    time = item.datetime or item.common_metadata.start_datetime
    cover = item.properties.get('eo:cloud_cover')
    common = {
        'sensor': sensor.name,
        'datetime': time,
        'scene': item.id,
        'cloud_cover': cover / 100 if isinstance(cover, int | float) else None,
    }
    found: dict[tuple[str | None, ...], tuple[tuple[float, bool], str, Mapping[str, Any]]] = {}
    assets: dict[str, Mapping[str, Any]] = {n: a.to_dict() for n, a in item.assets.items()}
    data = {name: asset for name, asset in assets.items() if holds_data(name, asset)}
    for name, asset in data.items():
        bands = tuple(bands_in(name, asset, sensor))
        if bands:
            rank = _rank(asset)
            if bands not in found or rank < found[bands][0]:
                found[bands] = rank, name, asset
    if not found and len(data) == 1:
        # A single file with band descriptions, or with all bands of the sensor.
        name, asset = next(iter(data.items()))
        found[()] = _rank(asset), name, asset
    taken: set[str] = set()
    for bands, (_, name, asset) in sorted(found.items(), key=lambda entry: entry[1][0]):
        new = [band if band not in taken else None for band in bands]
        if bands and not any(new):
            continue
        taken |= {band for band in new if band is not None}
        path = _href(item, name, file)
        for index, band, scaling in _parts(asset, new, sensor, item, file):
            yield {**common, 'path': path, 'index': index, 'band': band, **scaling._asdict()}


def _rank(asset: Mapping[str, Any]) -> tuple[float, bool]:
    """Rank assets with the same bands: the finest is preferred, and others over JPEG 2000."""
    entries = [*(asset.get('raster:bands') or ()), *(asset.get('bands') or ()), asset]
    sizes = [e.get('gsd') or e.get('spatial_resolution') for e in entries]
    size = next((float(s) for s in sizes if isinstance(s, int | float)), 0.0)
    return size, 'jp2' in str(asset.get('type')) or str(asset.get('href')).endswith('.jp2')


def _parts(
    asset: Mapping[str, Any],
    bands: list[str | None],
    sensor: Sensor,
    item: pystac.Item,
    file: Path,
) -> Iterator[tuple[int | None, str | None, Scaling]]:
    """Yield index, bands and scaling of the rows of an asset: one row if the scaling is common."""
    try:
        scalings = [
            without_baseline_offset(scaling_of(asset, n), sensor, item.id, item.properties)
            for n in range(1, max(len(bands), 1) + 1)
        ]
    except ValueError as error:
        raise TableError(
            f'{printable(file)}: item {printable(item.id)} is malformed: {printable(error)}'
        ) from error
    # Units in catalogues are not standardised. If there is a scale, the unit is not needed.
    scalings = [s if s.scale is None else s._replace(unit=None) for s in scalings]
    if len(set(scalings)) == 1:
        yield None, ' '.join(band or '-' for band in bands) or None, scalings[0]
        return
    for number, (band, scaling) in enumerate(zip(bands, scalings, strict=True), 1):
        if band is not None:
            yield number, band, scaling


def _href(item: pystac.Item, name: str, file: Path) -> str:
    """Return the path or URL of an asset."""
    href = item.assets[name].href
    if not isinstance(href, str) or not href or '\0' in href:
        raise TableError(f'{printable(file)}: item {printable(item.id)}: asset {name} has no href')
    url = urlparse(href)
    if url.scheme == 'file':
        return unquote(url.path)
    if url.scheme or href.startswith('/'):
        return href
    base = item.get_self_href()
    folder = Path(base).parent if base and '://' not in base else file.parent
    return str((folder / href).resolve())
