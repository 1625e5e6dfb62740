"""Bands, scales and sensors from the metadata of STAC items and assets."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from geofm.sensors import SENSORS, Sensor
from geofm.units import baseline_of

#: Roles of assets without data: pictures for display and metadata.
NO_DATA_ROLES = frozenset({'overview', 'thumbnail', 'visual', 'metadata'})

#: Names of assets that are pictures for display.
PICTURES = frozenset({'visual', 'preview', 'thumbnail', 'rendered_preview'})

#: Properties from which the sensor of an item is identified.
_TELLING = (
    *('constellation', 'platform', 'instruments', 'title', 'processing:level', 'product:type'),
    *('s2:product_type', 'sar:product_type', 'gee:type'),
)


class Scaling(NamedTuple):
    """Conversion from raw numbers to values of a band: value = number * scale + offset.

    Attributes:
        scale: Factor; None to use that of the file.
        offset: Offset; None to use that of the file.
        unit: Unit of the values.
        nodata: Nodata value.
    """

    scale: float | None = None
    offset: float | None = None
    unit: str | None = None
    nodata: float | None = None


def holds_data(name: str, asset: Mapping[str, Any]) -> bool:
    """Return whether an asset may have bands.

    Args:
        name: Key of the asset in the item.
        asset: The asset.

    Returns:
        False for pictures for display and for metadata.
    """
    return not NO_DATA_ROLES & set(asset.get('roles') or ()) and name.lower() not in PICTURES


def bands_in(name: str, asset: Mapping[str, Any], sensor: Sensor) -> list[str | None]:
    """Find the bands of a sensor in an asset.

    Args:
        name: Key of the asset in the item.
        asset: The asset.
        sensor: The sensor.

    Returns:
        Name of each band in the order of the file, or None for a band of another sensor. The list
        is empty if the asset has no band of the sensor.
    """
    described: Sequence[Any] = asset.get('eo:bands') or asset.get('bands') or []
    names = [_band(entry, sensor) for entry in described]
    if not any(names) and len(described) <= 1:
        names = [_band({'name': name}, sensor)]
    return names if any(names) else []


def _band(entry: Mapping[str, Any], sensor: Sensor) -> str | None:
    """Return the name of the band in an entry of ``eo:bands`` or ``bands``."""
    for key in ('name', 'common_name', 'eo:common_name'):
        # Earth Search calls the JPEG 2000 twin of 'red' 'red-jp2'.
        band = sensor.find_band(str(entry.get(key) or '').lower().removesuffix('-jp2'))
        if band is not None:
            return band
    return None


def scaling_of(asset: Mapping[str, Any], number: int) -> Scaling:
    """Read the scaling of a band from an asset.

    Args:
        asset: The asset, with ``raster:bands`` or ``bands``.
        number: Number of the band, from 1.

    Returns:
        Scale, offset, unit and nodata value, as far as they are stated.

    Raises:
        ValueError: If one of them is not a number.
    """
    stated: dict[str, Any] = {}
    for field in Scaling._fields:
        entries = [
            asset[key][number - 1]
            for key in ('raster:bands', 'bands')
            if len(asset.get(key) or ()) >= number
        ]
        for entry in (*entries, asset):
            value = entry.get(f'raster:{field}', entry.get(field))
            if value is not None:
                stated[field] = value
                break
    for field in ('scale', 'offset', 'nodata'):
        if field in stated:
            try:
                stated[field] = float(stated[field])
            except (TypeError, ValueError) as error:
                raise ValueError(f'{field} {stated[field]!r} is not a number') from error
    unit = stated.pop('unit', None)
    return Scaling(**stated, unit=None if unit is None else str(unit))


def without_baseline_offset(
    scaling: Scaling, sensor: Sensor, item_id: str, properties: Mapping[str, Any]
) -> Scaling:
    """Subtract the offset of newer processing baselines, if the item does not state it.

    Args:
        scaling: Scaling of a band as stated by the item.
        sensor: Sensor of the band. Only some sensors have such an offset
            (:attr:`geofm.sensors.Sensor.baseline_offset`).
        item_id: ID of the item.
        properties: Properties of the item.

    Returns:
        The scaling, with the offset of the sensor if a property ``...:boa_offset_applied`` states
        that the offset has been subtracted already.
    """
    if not sensor.baseline_offset:
        return scaling
    scale = sensor.scale if scaling.scale is None else scaling.scale
    if any(v is True for k, v in properties.items() if k.endswith('boa_offset_applied')):
        return scaling._replace(scale=scale, offset=sensor.offset)
    if scaling.offset is None and (_processing_baseline(item_id, properties) or 0) >= 4:
        return scaling._replace(scale=scale, offset=-sensor.baseline_offset * scale)
    return scaling


def _processing_baseline(item_id: str, properties: Mapping[str, Any]) -> float | None:
    """Return the processing baseline of a Sentinel-2 item.

    Args:
        item_id: ID of the item.
        properties: Properties of the item.

    Returns:
        E.g. 5.09 for '05.09'; None if it is not stated.
    """
    for key, value in properties.items():
        if key.endswith(('processing_baseline', 'processing:version')):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
    texts = [item_id, *(v for k, v in properties.items() if k.endswith(('uri', 'id')))]
    return next((found for text in texts if (found := baseline_of(str(text)))), None)


def sensor_of_item(
    item_id: str, collection: str | None, properties: Mapping[str, Any]
) -> Sensor | None:
    """Find the sensor of an item.

    Args:
        item_id: ID of the item.
        collection: ID of its collection.
        properties: Properties of the item.

    Returns:
        The sensor whose title, such as 'Sentinel-2 Level-2A', is most similar to the names of
        collection, constellation and so on; None if no sensor matches.
    """
    values = [properties.get(key) for key in _TELLING]
    parts = [p for v in values for p in (v if isinstance(v, list) else [v]) if p is not None]
    texts = ' '.join(map(str, [collection or '', item_id, *parts])).lower()
    words = set(re.split(r'[^a-z0-9]+', texts))
    squeezed = re.sub(r'[^a-z0-9]', '', texts)
    best, most = None, 0
    for sensor in SENSORS.values():
        first, *others = (_squeeze(word) for word in sensor.title.split())
        named = (first in squeezed) or sensor.name in words
        score = (2 * (first in squeezed) + (sensor.name in words)) if named else 0
        score += sum(len(word) > 1 and word in squeezed for word in others) if named else 0
        if score > most:
            best, most = sensor, score
    return best


def _squeeze(word: str) -> str:
    """Convert a word of a title to the spelling of STAC catalogues, e.g. 'Level-2A' to 'l2a'."""
    return re.sub(r'[^a-z0-9]', '', re.sub(r'^level-', 'l', word.lower()))
