"""Files of the sample data: rasters, and a manifest by which complete data are recognised."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio

from geofm.grid import Grid
from geofm.printing import counted
from geofm.sample.classes import LAND_COVER

#: Name of the file with the parameters of the data and the size of each file.
MANIFEST = 'sample.json'


def read_same_data(dest: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read the manifest of existing data, and check that they are the requested data.

    Args:
        dest: Folder of the data.
        wanted: Parameters that the data must have been generated with.

    Returns:
        The manifest.

    Raises:
        ValueError: If the folder has other content, other sample data, or damaged sample data.
    """
    advice = 'nothing was written: choose another folder, or delete this one'
    try:
        found = json.loads((dest / MANIFEST).read_text())
        files = found.pop('files')
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f'{dest}: exists and is not sample data of geofm; {advice}') from None
    if found != wanted:
        other = {k: v for k, v in found.items() if v != wanted.get(k)}
        raise ValueError(f'{dest}: holds other sample data ({other}); {advice}')
    if broken := [name for name, size in files.items() if _size(dest / name) != size]:
        raise ValueError(
            f'{dest}: sample data with {counted(len(broken), "file")} missing or changed, e.g. '
            f'{broken[0]}; {advice}'
        )
    return {**found, 'files': files}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def write_manifest(root: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder after all its other files.

    Args:
        root: The folder.
        made_with: Parameters that the data were generated with.

    Returns:
        The manifest: *made_with*, and the size in bytes of each file.
    """
    manifest = {**made_with, 'files': _sizes(root)}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + '\n')
    return manifest


def _sizes(root: Path) -> dict[str, int]:
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}


def date_in_2018(day: int) -> datetime.date:
    """Return the date of a day of the year 2018.

    Args:
        day: Day of the year, from 1.

    Returns:
        The date.
    """
    return datetime.date(2018, 1, 1) + datetime.timedelta(days=day - 1)


def write_raster(
    path: Path, image: npt.NDArray[Any], grid: Grid, names: Sequence[str] | None = None
) -> None:
    """Write an uncompressed, pixel-interleaved GeoTIFF without a nodata value, as in SEN12MS-CR-TS.

    Args:
        path: The file. Its folder is created if necessary.
        image: Pixels of shape (C, H, W).
        grid: Grid of the pixels.
        names: Descriptions of the bands.
    """
    with _create(path, image, grid) as dst:
        dst.write(image)
        if names is not None:
            dst.descriptions = tuple(names)


def write_land_cover(path: Path, image: npt.NDArray[np.uint8], grid: Grid) -> None:
    """Write a land-cover map with a colour table, and its classes as tags.

    Args:
        path: The file. Its folder is created if necessary.
        image: Class values of shape (1, H, W).
        grid: Grid of the pixels.
    """
    with _create(path, image, grid) as dst:
        dst.write(image)
        dst.write_colormap(1, {i: (*c.color, 255) for i, c in enumerate(LAND_COVER)})
        dst.update_tags(**{f'CLASS_{i}': c.name for i, c in enumerate(LAND_COVER)})


def _create(path: Path, image: npt.NDArray[Any], grid: Grid) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=len(image),
        height=grid.height,
        width=grid.width,
        dtype=image.dtype,
        crs=grid.crs,
        transform=grid.transform,
        interleave='pixel',
    )
