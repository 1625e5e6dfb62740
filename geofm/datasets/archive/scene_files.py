"""Write the observations of a place as one GeoTIFF per sensor, as input of the map commands."""

import datetime
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window
from rich.progress import track

from geofm.atomic import atomic_folder
from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.table import NO_TIME, RasterTable
from geofm.sensors import SENSORS, date_columns, reference_sensor
from geofm.suggestions import did_you_mean

#: Height and width of the windows that are read at once, in pixels.
_BLOCK = 512


class SceneFiles(NamedTuple):
    """Result of :func:`write_scene`.

    Attributes:
        files: GeoTIFF of each sensor, by the key of the sensor.
        dates: Date of each sensor with a date, by its key, as YYYY-MM-DD.
    """

    files: dict[str, Path]
    dates: dict[str, str]


def write_scene(
    table: RasterTable, place: str, output: Path, date: str | None = None
) -> SceneFiles:
    """Write the observations of a place as one GeoTIFF per sensor, all on one grid.

    Files of any format, with one or several bands or dates, become plain rasters with band
    descriptions: float32 in the unit of the sensor, NaN where any sensor has no data. Files that
    are on the grid of the reference sensor are not resampled.

    Args:
        table: Scanned table of rasters.
        place: Name of the place.
        output: Folder to write. It must not exist or must be empty.
        date: Day as YYYY-MM-DD. The nearest observation of the reference sensor is used. Default:
            the first observation.

    Returns:
        The files.

    Raises:
        ValueError: If the table has no such place, its files have no CRS, or *date* is not a date.
    """
    archive = _archive_of(table, place)
    position = _nearest(archive, date)
    grid, _, extent = archive.matches.scene(position)
    if grid is None:
        raise ValueError(
            f'{table.source}: the files of {place} have no CRS, so there is no scene to map; '
            'assign one to them and index them again'
        )
    keys = [key for key in archive.sensors if archive.matches.paths(position, key)]
    profile = {
        'driver': 'GTiff',
        'dtype': 'float32',
        'nodata': np.nan,
        'crs': grid.crs,
        'transform': grid.transform,
        'height': extent.height,
        'width': extent.width,
        'compress': 'deflate',
        'predictor': 3,
        'tiled': True,
        'BIGTIFF': 'IF_SAFER',
    }
    channels = {
        key: [i for i, band in enumerate(archive.bands) if band in SENSORS[key].band_names]
        for key in keys
    }
    dates = _dates(archive, position, keys)
    with atomic_folder(output) as part, ExitStack() as stack:
        rasters: dict[str, Any] = {}
        for key in keys:
            profile['count'] = len(channels[key])
            dst = stack.enter_context(rasterio.open(part / f'{key}.tif', 'w', **profile))
            dst.descriptions = tuple(archive.bands[i] for i in channels[key])
            if key in dates:
                dst.update_tags(datetime=dates[key])
            rasters[key] = dst
        windows = list(_windows(extent.height, extent.width))
        for window in track(windows, 'Writing the scene', disable=len(windows) < 4):
            image = _read(archive, position, window)
            for key, dst in rasters.items():
                dst.write(image[channels[key]], window=window)
    return SceneFiles({key: output / f'{key}.tif' for key in keys}, dates)


def _archive_of(table: RasterTable, place: str) -> RasterArchive:
    """Return all observations of a place, with the sensors that it has."""
    names = [table.places[i] for i in range(len(table.places))]
    if place not in names:
        known = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
        raise ValueError(
            f"{table.source}: no place '{place}'{did_you_mean(place, names)}"
            + (f'; places are {known}' if names else "; its rows have no column 'place'")
        )
    rows = np.flatnonzero((table.place == names.index(place)) & (table.problem < 0))
    if not len(rows):
        raise ValueError(f'{table.source}: none of the files of {place} can be used')
    part = table.take(rows)
    keys = [part.sensors[code] for code in np.unique(part.sensor)]
    others = [key for key in keys if key != reference_sensor(keys)]
    with warnings.catch_warnings():
        # Ignore sensors that are missing on other dates of the place.
        warnings.simplefilter('ignore')
        return RasterArchive(part, keys, split='all', allow_missing=others, min_overlap=0)


def _nearest(archive: RasterArchive, date: str | None) -> int:
    """Return the index of the sample that is nearest to a date."""
    if date is None:
        return 0
    try:
        day = np.datetime64(datetime.date.fromisoformat(date), 'D')
    except ValueError as error:
        raise ValueError(f"date '{date}' must be a day like 2018-02-28") from error
    numbers = archive.matches.reference_observations()
    times = archive.matches.archive.observations.time[numbers]
    days = times.astype('datetime64[us]').astype('datetime64[D]')
    gaps = np.abs((days - day).astype(np.int64)).astype(float)
    gaps[times == NO_TIME] = np.inf
    return int(np.argmin(gaps))


def _dates(archive: RasterArchive, position: int, keys: list[str]) -> dict[str, str]:
    """Return the dates of the sensors with a date."""
    columns = date_columns(archive.sensors)
    days = archive.matches.days(position).astype('datetime64[D]')
    named = dict(zip(columns, days, strict=True))
    return {key: str(named[key]) for key in keys if not np.isnat(named[key])}


def _windows(height: int, width: int) -> Iterator[Window]:
    for row in range(0, height, _BLOCK):
        for col in range(0, width, _BLOCK):
            yield Window(col, row, min(_BLOCK, width - col), min(_BLOCK, height - row))


def _read(archive: RasterArchive, position: int, window: Window) -> npt.NDArray[np.float32]:
    """Read all bands of a window, with NaN where they have no data."""
    sample = archive.read_pair(position, window)
    image: npt.NDArray[np.float32] = sample['image'].numpy()
    image[:, ~sample['valid'].numpy()] = np.nan
    return image
