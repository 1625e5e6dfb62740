"""A Sentinel-1 and Sentinel-2 scene of any size, read window by window on one grid."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from rasterio.enums import Resampling
from rasterio.errors import RasterioIOError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from torch import Tensor

from geofm.grid import Grid, read_on_grid
from geofm.sensor_rasters import name_bands
from geofm.sensors import (
    SENSORS,
    SENTINEL1,
    BandError,
    Sensor,
    band_indices,
    check_bands,
    sensor_channels,
)

_FILE_DATE = re.compile(r'(?<!\d)((?:19|20)\d{2})(-?)(\d{2})\2(\d{2})(?:T\d{6})?(?!\d)')

# Where GDAL's drivers and common producers put the time of acquisition. TIFFTAG_DATETIME is not
# among them: by the standard it is when the file was made.
_DATE_TAGS = (
    ('IMAGERY', 'ACQUISITIONDATETIME'),
    (None, 'ACQUISITION_DATE'),
    (None, 'DATATAKE_1_DATATAKE_SENSING_START'),
    (None, 'PRODUCT_START_TIME'),
)


@dataclass(frozen=True)
class SensorRaster:
    """One sensor's open raster.

    Attributes:
        sensor: The sensor.
        src: The raster.
        bands: Name of each band that is known, and its index in the file, from 0.
        date: Day of acquisition, NaT if unknown.
    """

    sensor: Sensor
    src: DatasetReader
    bands: Mapping[str, int]
    date: np.datetime64

    @classmethod
    def open(
        cls,
        path: Path,
        sensor: Sensor,
        date: str | None = None,
        bands: Sequence[str] | None = None,
    ) -> Self:
        """Open a raster of a sensor.

        Args:
            path: Any raster that GDAL reads. Descriptions of its bands decide which is which,
                e.g. 'B8A' or 'Sigma0_VV'; without any, it must have all bands of the sensor in
                the sensor's order, or *bands* must name them.
            sensor: The sensor.
            date: Day of acquisition, YYYY-MM-DD. Default: from the file's name or metadata.
            bands: Name of each band of the file, in its order, whatever it says of itself.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no raster, has no CRS, or the date is none.
            BandError: If it cannot be told which band is which.
        """
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file (given as the {sensor.title} raster)')
        try:
            src = rasterio.open(path)
        except RasterioIOError as error:
            raise ValueError(f'{path}: GDAL cannot read this raster: {error}') from error
        try:
            Grid.of(src)
            day = acquisition_date(src) if date is None else _day(date, sensor)
            return cls(sensor, src, name_bands(src, sensor, bands), day)
        except ValueError:
            src.close()
            raise


def acquisition_date(src: DatasetReader) -> np.datetime64:
    """Day on which a scene was acquired, from its file name or its metadata.

    Args:
        src: Open raster. In its name, YYYY-MM-DD or YYYYMMDD counts, as in SEN12MS-CR-TS and in
            the names of Sentinel products; the first one, which is the time of sensing there.

    Returns:
        The day, NaT if unknown.
    """
    tags = (src.tags(ns=domain).get(key, '') for domain, key in _DATE_TAGS)
    for text in (Path(src.name).name, *tags):
        for match in _FILE_DATE.finditer(text.replace('/', '-')):
            year, _, month, day = match.groups()
            try:
                return np.datetime64(f'{year}-{month}-{day}', 'D')
            except ValueError:
                continue
    return np.datetime64('NaT', 'D')


def _day(text: str, sensor: Sensor) -> np.datetime64:
    try:
        return np.datetime64(text, 'D')
    except ValueError as error:
        raise ValueError(f"{sensor.name} date '{text}' is not a day: give YYYY-MM-DD") from error


def read_where_covered(
    raster: SensorRaster, grid: Grid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Read all bands on a grid that may reach beyond the raster.

    Where both share their pixels, those that the raster has are read bit for bit, as
    :func:`geofm.grid.read_on_grid` does for grids inside the raster; otherwise it is warped.

    Args:
        raster: Open raster.
        grid: Grid to read on.

    Returns:
        Pixels, float32 of shape (C, H, W), and where they are valid, bool of shape (H, W), by the
        rule of :class:`geofm.datasets.SEN12MSCRTS`: Sentinel-1 has data where no band is nodata,
        Sentinel-2 where not all bands are (B10 may well be 0); 0 in all bands is fill, whether the
        file says so or not. Pixels that the raster does not cover are NaN.
    """
    src = raster.src
    part = _shared_part(Grid.of(src), grid)
    if part is None:
        return _warp(raster, grid, Resampling.bilinear)
    row, col, shared = part
    pixels = np.full((src.count, *grid.shape), np.nan, np.float32)
    valid = np.zeros(grid.shape, bool)
    inside = (slice(row, row + shared.height), slice(col, col + shared.width))
    pixels[:, *inside], _ = read_on_grid(src, shared)
    valid[inside] = _has_data(pixels[:, *inside], raster, src.nodata)
    return pixels, valid


def _shared_part(own: Grid, grid: Grid) -> tuple[int, int, Grid] | None:
    """Part of a grid that is part of a raster's own: its first row, its first column, and it."""
    if own.crs != grid.crs:
        return None
    to_grid = ~grid.transform @ own.transform
    corners = (to_grid @ (0, 0), to_grid @ (own.width, own.height))
    left, right = sorted(round(col) for col, _ in corners)
    top, bottom = sorted(round(row) for _, row in corners)
    left, right = max(left, 0), min(right, grid.width)
    top, bottom = max(top, 0), min(bottom, grid.height)
    if left >= right or top >= bottom:
        return None
    part = grid.crop(top, left, bottom - top, right - left)
    return None if part.window_in(own) is None else (top, left, part)


def _warp(
    raster: SensorRaster, grid: Grid, resampling: Resampling
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Bring a raster onto a grid; pixels without data bleed into none."""
    # 0 in all bands is fill, of which GDAL must know before it blends pixels.
    pixels, _ = read_on_grid(raster.src, grid, resampling, fill=0)
    return pixels, _has_data(pixels, raster, None)


def _has_data(
    pixels: npt.NDArray[np.float32], raster: SensorRaster, nodata: float | None
) -> npt.NDArray[np.bool_]:
    """Where the bands of the sensor, among all of a file, hold data."""
    pixels = pixels[list(raster.bands.values())]
    valid = np.isfinite(pixels).all(axis=0) & (pixels != 0).any(axis=0)
    if nodata is not None and not np.isnan(nodata):
        known = pixels != np.float32(nodata)
        valid &= known.all(axis=0) if raster.sensor is SENTINEL1 else known.any(axis=0)
    return valid


class Scene:
    """Rasters of one or two sensors, read on the grid of one: Sentinel-2's where it is given.

    Use it as a context manager, which closes the files.

    Attributes:
        grid: The grid of the scene.
        path: The raster that has this grid.
        bands: Names of the channels that are read.
        rasters: The open raster of each sensor that is there, by key.
    """

    def __init__(
        self,
        bands: Sequence[str],
        s1: Path | None = None,
        s2: Path | None = None,
        dates: Mapping[str, str] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Open the rasters of the sensors that the bands belong to.

        Args:
            bands: Names of the channels to read, in the order to return. A raster whose sensor
                has none of them is not opened.
            s1: Sentinel-1 raster, in dB.
            s2: Sentinel-2 raster, in DN (reflectance x 10,000).
            dates: Days of acquisition as YYYY-MM-DD, by sensor ('s1', 's2'). Default: from the
                file's name or metadata, unknown where there is none.
            names: Name of each band of a file, in its order, by sensor. Default: as the file
                describes its bands; all of the sensor's in its order if it does not.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If no raster of these sensors is given, one cannot be read or has no CRS,
                they do not overlap, or a date is none.
            BandError: If a band is unknown, or a raster lacks one.
        """
        self.bands = check_bands(bands)
        dates = dates or {}
        names = names or {}
        if unknown := sorted({*dates, *names} - set(SENSORS)):
            raise ValueError(f'dates or bands of unknown sensors {unknown}: known: {[*SENSORS]}')
        self._channels = sensor_channels(self.bands)
        paths = {key: {'s1': s1, 's2': s2}[key] for key in self._channels}
        if not any(paths.values()):
            wanted = ' or '.join(f'{SENSORS[key].title} (--{key})' for key in paths)
            raise ValueError(f'no raster given for {wanted}')
        with ExitStack() as stack:
            self.rasters: dict[str, SensorRaster] = {}
            for key, path in paths.items():
                if path is not None:
                    raster = SensorRaster.open(path, SENSORS[key], dates.get(key), names.get(key))
                    stack.callback(raster.src.close)
                    self.rasters[key] = raster
            reference = self.rasters.get('s2', next(iter(self.rasters.values())))
            self.path = Path(reference.src.name)
            self.grid = Grid.of(reference.src)
            self._indices = {key: self._indices_of(raster) for key, raster in self.rasters.items()}
            self._check_overlap()
            self._files = stack.pop_all()

    def _indices_of(self, raster: SensorRaster) -> list[int]:
        wanted = [self.bands[channel] for channel in self._channels[raster.sensor.name]]
        try:
            found = band_indices(wanted, list(raster.bands))
        except BandError as error:
            raise BandError(f'{raster.src.name}: {error}') from error
        indices = list(raster.bands.values())
        return [indices[i] for i in found]

    def _check_overlap(self) -> None:
        outlines = [Grid.of(r.src).footprint(self.grid.crs) for r in self.rasters.values()]
        if len(outlines) == 2 and not outlines[0].intersection(outlines[1]).area > 0:
            first, second = (raster.src.name for raster in self.rasters.values())
            raise ValueError(
                f'{first} and {second} do not overlap: give two rasters of the same ground'
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.close()

    @property
    def dates(self) -> Tensor:
        """Days of acquisition of S1 and S2 since 1970-01-01, int64 (2,); least int64 = unknown."""
        nat = np.datetime64('NaT', 'D')
        days = [self.rasters[key].date if key in self.rasters else nat for key in SENSORS]
        return torch.from_numpy(np.array(days, 'datetime64[D]').astype(np.int64))

    def read(self, row: int, col: int, height: int, width: int) -> dict[str, Tensor]:
        """Read a window, which may reach beyond the scene.

        Args:
            row: First row in pixels of the grid.
            col: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            A sample: 'image' float32 (C, H, W) in raw units, in the order of the bands; 'valid'
            bool (H, W), where all sensors that are there have data; 'dates' int64 (2,). Channels
            of a sensor that is not there are 0.
        """
        grid = self.grid.crop(row, col, height, width)
        image = np.zeros((len(self.bands), height, width), np.float32)
        # Beyond the grid's own raster there is no scene, even if the other sensor goes on.
        valid = np.ones((height, width), bool)
        for key, raster in self.rasters.items():
            pixels, has_data = read_where_covered(raster, grid)
            image[self._channels[key]] = pixels[self._indices[key]]
            valid &= has_data
        return {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(valid),
            'dates': self.dates,
        }

    def thumbnail(
        self, bands: Sequence[str], max_side: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Read bands of one sensor at a size fit for a picture, never the whole scene at once.

        Args:
            bands: Bands of one sensor that is there; the raster must have them, the scene's own
                bands need not contain them.
            max_side: Longest side of the picture in pixels.

        Returns:
            Pixels, float32 of shape (C, h, w), averaged where the scene is larger than that; and
            where they are valid, bool of shape (h, w).
        """
        (key,) = sensor_channels(bands)
        raster = self.rasters[key]
        indices = [raster.bands[band] for band in bands]
        grid = self.grid
        shrink = max(1.0, max(grid.shape) / max_side)
        height, width = (max(1, round(side / shrink)) for side in grid.shape)
        if shrink == 1:
            pixels, valid = read_where_covered(raster, grid)
            return pixels[indices], valid
        if Grid.of(raster.src) == grid:
            # GDAL takes an overview where there is one, and averages block by block otherwise.
            masked = raster.src.read(
                [i + 1 for i in indices],
                out_shape=(len(bands), height, width),
                resampling=Resampling.average,
                masked=True,
                out_dtype='float32',
            )
            pixels = masked.filled(np.nan)
            return pixels, np.isfinite(pixels).all(axis=0)
        scale = Affine.scale(grid.width / width, grid.height / height)
        small = replace(grid, transform=grid.transform @ scale, height=height, width=width)
        pixels, valid = _warp(raster, small, Resampling.average)
        return pixels[indices], valid
