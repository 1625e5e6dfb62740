"""Sentinel-2 products in their delivery format: SAFE folders, and zip files of them."""

import datetime
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from geofm.sensors import SENTINEL2, Sensor

_BAND_FILE = re.compile(r'_(B\w\w)(?:_(\d\d)m)?\.(?:jp2|tiff?)$', re.IGNORECASE)
_METADATA = re.compile(r'(?:^|/)MTD_MSI(?:L1C|L2A)\.xml$', re.IGNORECASE)

#: Maximum size of a metadata file in bytes.
_MOST_BYTES = 1 << 24


class ProductBand(NamedTuple):
    """Band of a product.

    Attributes:
        band: Name of the channel.
        path: Path of its file in the product folder or zip file.
        offset: Offset to add to its DN.
    """

    band: str
    path: str
    offset: float


class Product(NamedTuple):
    """Sentinel-2 product.

    Attributes:
        name: Name of the product.
        time: Acquisition time; None if the metadata do not have it.
        scale: Factor that converts the stored numbers to DN = reflectance x 10,000.
        bands: Its bands, each at the finest available resolution.
    """

    name: str
    time: datetime.datetime | None
    scale: float
    bands: tuple[ProductBand, ...]


def is_product(path: str) -> bool:
    """Check whether a name is that of a Sentinel-2 product.

    Args:
        path: Path of a folder or zip file.

    Returns:
        Whether it ends in ``.SAFE``, or is a zip file named like a product.
    """
    name = os.path.basename(path).lower()  # noqa: PTH119
    return name.endswith(('.safe', '.safe.zip')) or bool(re.match(r's2\w_msil\w+\.zip$', name))


def read_product(path: str | Path, sensor: Sensor) -> Product:
    """List the bands of a product.

    Args:
        path: SAFE folder or zip file.
        sensor: The sensor.

    Returns:
        The product.

    Raises:
        FileNotFoundError: If there is no such product.
        ValueError: If the product has no file of any band of the sensor, or the zip file or the
            metadata cannot be read.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f'{file}: no such file')
    if file.is_dir():
        names = [p.relative_to(file).as_posix() for p in file.rglob('*') if p.is_file()]
        return _product(file, names, lambda name: (file / name).read_bytes(), sensor)
    try:
        with zipfile.ZipFile(file) as archive:
            return _product(file, archive.namelist(), archive.read, sensor)
    except zipfile.BadZipFile as error:
        raise ValueError(f'{file}: cannot be read as a zip file ({error})') from error


def _product(file: Path, names: list[str], read: Callable[[str], bytes], sensor: Sensor) -> Product:
    """Make a product from the names of its files."""
    metadata = next((name for name in names if _METADATA.search(name)), None)
    time, scale, offsets = None, 1.0, dict[str, float]()
    if metadata is not None:
        time, scale, offsets = _facts(file, read(metadata))
    finest: dict[str, tuple[int, str, str]] = {}
    for name in sorted(names):
        match = _BAND_FILE.search(name)
        if match is None or 'IMG_DATA' not in name:
            continue
        band = sensor.find_band(match[1])
        resolution = int(match[2] or 0)
        if band is not None and (band not in finest or resolution < finest[band][0]):
            finest[band] = resolution, name, match[1].upper()
    if not finest:
        raise ValueError(
            f'{file}: no file of a band of {sensor.title} in IMG_DATA; the product is incomplete'
        )
    bands = tuple(
        ProductBand(band, finest[band][1], offsets.get(finest[band][2], 0.0))
        for band in sensor.band_names
        if band in finest
    )
    return Product(re.sub(r'(\.zip|\.SAFE)+$', '', file.name), time, scale, bands)


def _facts(file: Path, content: bytes) -> tuple[datetime.datetime | None, float, dict[str, float]]:
    """Return time, scale and offsets from the metadata of a product."""
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f'{len(content):,} bytes')
        root = ET.fromstring(content)
        offsets, scale, time = dict[str, float](), 1.0, None
        for element in root.iter():
            tag, text = element.tag.rpartition('}')[2], (element.text or '').strip()
            if tag in ('RADIO_ADD_OFFSET', 'BOA_ADD_OFFSET'):
                offsets[SENTINEL2.band_names[int(element.attrib['band_id'])]] = float(text)
            elif tag in ('QUANTIFICATION_VALUE', 'BOA_QUANTIFICATION_VALUE'):
                scale = 10_000 / float(text)
            elif tag == 'PRODUCT_START_TIME' and text:
                time = datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    except (ET.ParseError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f'{file}: its metadata (MTD_MSI*.xml) cannot be read: {error}') from error
    return time, scale, {band: scale * offset for band, offset in offsets.items()}
