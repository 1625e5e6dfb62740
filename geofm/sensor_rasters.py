"""Reading rasters of a sensor: band names, values in the sensor's unit, valid pixels.

Used by data sets, the catalogue and maps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rasterio.warp import transform
from rasterio.windows import Window

from geofm.grid import Grid, alpha_band, own_mask, warp_values
from geofm.printing import counted
from geofm.sensors import BandError, Sensor, band_indices, check_bands
from geofm.validity import Bools, mark_beyond_limits, mark_nodata

#: Maximum scale that a file may state for reflectance from 0 to 1 stored as integers.
_REFLECTANCE_SCALE = 0.01

#: Maximum number of values read at once: 1 GiB as float32.
MOST_VALUES = 1 << 28

#: Reach of resampling kernels on each side, in pixels; 2 for other methods.
REACH = {'lanczos': 4, 'cubic': 3, 'cubic_spline': 3}

#: Units that a file may state for backscatter, and the factor f of dB = f * log10(value).
_TO_DB = {'linear': 10.0, 'power': 10.0, 'linear power': 10.0, 'amplitude': 20.0}


class UnitError(ValueError):
    """The scale of a file does not match the unit of its sensor."""


@dataclass(frozen=True)
class SensorBands:
    """Reader of the bands of a sensor in a raster.

    Attributes:
        sensor: The sensor.
        indices: Index in the file, from 0, of each known band by name.
        named: Whether the file names its bands. Otherwise the order of the sensor is assumed.
        scale: Factor per band to convert raw numbers to the unit of the sensor, float64 (C, 1, 1);
            None if they are in that unit.
        offset: Offset per band, added after multiplication by :attr:`scale`, float64 (C, 1, 1).
        logarithm: Factor f of dB = f * log10(value) if the file states that its values are linear
            power or amplitude, else None.
        others: Indices of further bands of the sensor that are only used to distinguish a
            measurement of 0 from fill.
    """

    sensor: Sensor
    indices: Mapping[str, int]
    named: bool = False
    scale: npt.NDArray[np.float64] | None = None
    offset: npt.NDArray[np.float64] | None = None
    logarithm: float | None = None
    others: tuple[int, ...] = ()

    @classmethod
    def of(cls, src: DatasetReader, sensor: Sensor, bands: Sequence[str] | None = None) -> Self:
        """Make the reader of a raster.

        Args:
            src: Open raster.
            sensor: Sensor of the raster.
            bands: Name of each band of the file, see :func:`name_bands`.

        Returns:
            The reader.

        Raises:
            BandError: If the bands cannot be identified.
            UnitError: If the scale of the file does not match the unit of the sensor.
        """
        indices = name_bands(src, sensor, bands)
        named = bands is not None or any(
            band_name(_description(src, i), sensor) for i in indices.values()
        )
        scale = np.array([src.scales[i] for i in indices.values()])[:, None, None]
        offset = np.array([src.offsets[i] for i in indices.values()])[:, None, None]
        units = {(src.units[i] or '').strip().lower() for i in indices.values()}
        logarithm = None
        if sensor.unit == 'dB' and len(units) == 1:
            logarithm = _TO_DB.get(next(iter(units)))
        is_reflectance = units == {'reflectance'} and (scale == 1).all()
        if sensor.unit == 'DN' and not is_reflectance and (scale != 1).any():
            if not ((scale > 0) & (scale <= _REFLECTANCE_SCALE)).all():
                raise UnitError(
                    f'{src.name}: its scale {scale.max():g} converts its values neither to DN nor '
                    f'to reflectance from 0 to 1: store DN (reflectance '
                    f'{_dn_of_reflectance(sensor)}) without a scale'
                )
            is_reflectance = True
        if sensor.unit == 'DN' and is_reflectance:
            scale, offset = _to_dn(scale, offset, sensor)
        if not (np.isfinite(scale).all() and np.isfinite(offset).all() and scale.all()):
            raise UnitError(f'{src.name}: its scale or offset is not a valid number')
        if (scale == 1).all() and not offset.any():
            return cls(sensor, indices, named, logarithm=logarithm)
        return cls(sensor, indices, named, scale, offset, logarithm)

    def choose(self, bands: Sequence[str]) -> Self:
        """Select bands to read. Only these determine which pixels are valid.

        Args:
            bands: Names of the bands, in the order in which to read them.

        Returns:
            The reader of these bands.

        Raises:
            BandError: If a band is missing.
        """
        order = band_indices(bands, list(self.indices))
        every = list(self.indices.values())
        return replace(
            self,
            indices={name: self.indices[name] for name in bands},
            scale=None if self.scale is None else self.scale[order],
            offset=None if self.offset is None else self.offset[order],
            others=tuple(i for k, i in enumerate(every) if k not in order),
        )

    def read(
        self, src: DatasetReader, window: Window | None = None
    ) -> tuple[npt.NDArray[np.float32], Bools]:
        """Read all known bands.

        Args:
            src: The raster.
            window: Window in whole pixels inside the raster; the whole raster by default.

        Returns:
            Values in the unit of the sensor, float32 (C, H, W), in the order of :attr:`indices`,
            and which pixels are valid, bool (H, W), according to :mod:`geofm.validity` and the mask
            of the file. The values of other pixels are meaningless.
        """
        _, values, valid = self.numbers_and_values(src, window)
        return values, valid

    def numbers_and_values(
        self, src: DatasetReader, window: Window | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], Bools]:
        """Read all known bands, as raw numbers and in the unit of the sensor.

        Args:
            src: The raster.
            window: Window in whole pixels inside the raster; the whole raster by default.

        Returns:
            Raw numbers (C, H, W), and values and valid pixels as returned by :meth:`read`.
        """
        numbers, valid = self._read_numbers(src, window)
        values = self.scaled(numbers)
        mark_beyond_limits(values, valid, self.sensor)
        return numbers, values, valid

    def read_on(self, src: DatasetReader, grid: Grid) -> tuple[npt.NDArray[np.float32], Bools]:
        """Read all known bands on a grid, and warp the raster if necessary.

        Args:
            src: The raster.
            grid: The grid.

        Returns:
            Values and valid pixels as returned by :meth:`read`. If the raster contains the pixels
            of the grid, they are not resampled. Otherwise the valid pixels are warped with the
            resampling method of the sensor, and pixels without data are NaN.

        Raises:
            ValueError: If the raster has too many pixels in the area of the grid.
        """
        own = Grid.of(src)
        window = grid.window_in(own)
        if window is not None:
            return self.read(src, window)
        warped = np.full((len(self.indices), *grid.shape), np.nan, np.float32)
        window = covering_window(own, grid, REACH.get(self.sensor.resampling, 2))
        if window is not None:
            if window.width * window.height * src.count > MOST_VALUES:
                raise ValueError(
                    f'{src.name}: {window.width} x {window.height} pixels for a grid of '
                    f'{grid.width} x {grid.height}: resample it to a coarser resolution'
                )
            values, valid = self.read(src, window)
            # Before warping, since it would affect neighbouring pixels.
            values[:, ~valid] = np.nan
            part = own.crop(window.row_off, window.col_off, window.height, window.width)
            method = Resampling[self.sensor.resampling]
            warped = warp_values(
                values, grid, method, src_transform=part.transform, src_crs=own.crs
            )
        return warped, np.isfinite(warped).all(axis=0)

    def measured(self, src: DatasetReader, window: Window) -> npt.NDArray[np.float32]:
        """Read the values of a window, to detect their unit.

        Args:
            src: The raster.
            window: Window in whole pixels inside the raster.

        Returns:
            Values of pixels with data in all bands, one-dimensional. Values above the limits of the
            sensor are included, since they may be in another unit.
        """
        numbers, valid = self._read_numbers(src, window)
        values = self.scaled(numbers)
        valid &= (values >= self.sensor.limits[0]).all(axis=0)
        return values[:, valid].ravel()

    def _read_numbers(
        self, src: DatasetReader, window: Window | None
    ) -> tuple[npt.NDArray[Any], Bools]:
        """Read raw numbers, and which of them are neither masked nor nodata nor fill."""
        bands = list(self.indices.values())
        numbers = src.read([i + 1 for i in bands], window=window)
        valid = own_mask(src, bands, window)
        if valid is None:
            valid = np.ones(numbers.shape[1:], bool)
        others = None
        if self.others and not numbers.any(axis=0).all():
            others = src.read([i + 1 for i in self.others], window=window)
        mark_nodata(numbers, valid, self.sensor, [src.nodatavals[i] for i in bands], others)
        return numbers, valid

    def convert(
        self,
        numbers: npt.NDArray[Any],
        valid: Bools,
        nodata: Sequence[float | None] | float | None,
    ) -> npt.NDArray[np.float32]:
        """Convert raw numbers to the unit of the sensor, and mark pixels that are not valid.

        Args:
            numbers: Raw numbers (C, H, W), in the order of :attr:`indices`.
            valid: Which pixels are valid so far, (H, W); changed in place.
            nodata: Nodata value of the file.

        Returns:
            Values in the unit of the sensor, float32 (C, H, W).
        """
        mark_nodata(numbers, valid, self.sensor, nodata)
        values = self.scaled(numbers)
        mark_beyond_limits(values, valid, self.sensor)
        return values

    def scaled(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Convert raw numbers to the unit of the sensor, whether they are valid or not.

        Args:
            numbers: Raw numbers (C, H, W), in the order of :attr:`indices`.

        Returns:
            Values in the unit of the sensor, float32 (C, H, W).
        """
        # Overflow and logarithms of non-positive numbers are not finite, and therefore outside the
        # limits of the sensor.
        with np.errstate(over='ignore', invalid='ignore', divide='ignore'):
            values: npt.NDArray[Any] = numbers
            if self.scale is not None and self.offset is not None:
                values = values * self.scale + self.offset
            if self.logarithm is not None:
                values = self.logarithm * np.log10(values)
            return values.astype(np.float32)


def _dn_of_reflectance(sensor: Sensor) -> str:
    """Describe the conversion from reflectance to DN, for a message."""
    plus = f' + {-sensor.offset / sensor.scale:,.0f}' if sensor.offset else ''
    return f'x {1 / sensor.scale:,.0f}{plus}'


def _to_dn(
    scale: npt.NDArray[np.float64], offset: npt.NDArray[np.float64], sensor: Sensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Convert a scale and offset for reflectance to those for DN."""
    per_reflectance = 1 / sensor.scale
    scale, offset = scale * per_reflectance, (offset - sensor.offset) * per_reflectance
    # The scale of the sensor itself must become exactly 1 and 0, despite rounding.
    if np.allclose(scale, 1, rtol=1e-9, atol=0) and np.allclose(offset, 0, rtol=0, atol=1e-6):
        return np.ones_like(scale), np.zeros_like(offset)
    return scale, offset


def covering_window(own: Grid, grid: Grid, reach: int = 2) -> Window | None:
    """Find the window of a raster that is needed to warp it onto a grid.

    Args:
        own: Grid of the raster.
        grid: Grid to warp onto.
        reach: Reach of the resampling kernel on each side, in pixels of the coarser grid.

    Returns:
        Window of all pixels in and next to *grid*; None if there are none.
    """
    steps = np.linspace(0, 1, 22)
    edges = [(steps, 0 * steps), (steps, 1 + 0 * steps), (0 * steps, steps), (1 + 0 * steps, steps)]
    cols, rows = (np.concatenate(axis) for axis in zip(*edges, strict=True))
    x, y = grid.transform @ (cols * grid.width, rows * grid.height)
    if grid.crs != own.crs:
        x, y = (np.array(axis) for axis in transform(grid.crs, own.crs, x, y))
    row, col = own.pixel_of(x, y)
    if not (np.isfinite(row).all() and np.isfinite(col).all()):
        return None
    ratio = max(np.ptp(row) / grid.height, np.ptp(col) / grid.width, 1.0)
    margin = int(np.ceil(reach * ratio)) + 2
    top, left = (max(int(axis.min()) - margin, 0) for axis in (row, col))
    bottom = min(int(np.ceil(row.max())) + margin, own.height)
    right = min(int(np.ceil(col.max())) + margin, own.width)
    return Window(left, top, right - left, bottom - top) if left < right and top < bottom else None


def name_bands(
    src: DatasetReader, sensor: Sensor, bands: Sequence[str] | None = None
) -> dict[str, int]:
    """Identify the bands of a raster.

    Args:
        src: Open raster.
        sensor: Sensor of the raster.
        bands: Names of all bands of the file except its alpha band. By default, bands are
            identified by their descriptions in the file, or else by the order of the sensor.

    Returns:
        Index in the file, from 0, of each identified band by name.

    Raises:
        BandError: If two bands have the same name; if no band is described, and the number of bands
            is not that of the sensor; or if *bands* are not of the sensor, or their number is not
            that of the file.
    """
    alpha = alpha_band(src)
    data = [i for i in range(src.count) if i != alpha]
    if bands is not None:
        given = check_bands([sensor.find_band(band) or band for band in bands])
        if len(given) != len(data) or not set(given) <= set(sensor.band_names):
            raise BandError(
                f'{src.name}: {counted(len(data), "band")}, but the names {list(given)}: give one '
                f'of {", ".join(sensor.band_names)} for each, in the order of the file'
            )
        return dict(zip(given, data, strict=True))
    named = [(band_name(_description(src, i), sensor), i) for i in data]
    known = [(name, i) for name, i in named if name is not None]
    found = dict(known)
    if len(found) < len(known):
        names = [name for name, _ in known]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BandError(f'{src.name}: several bands are described as {twice}; rename all but one')
    if found:
        return found
    if len(data) != len(sensor.bands):
        raise BandError(
            f'{src.name}: {counted(len(data), "band")} without names, but {sensor.title} has '
            f'{len(sensor.bands)}: {", ".join(sensor.band_names)}. Give a file with these in this '
            f'order, or set the band descriptions, or name the bands'
        )
    return dict(zip(sensor.band_names, data, strict=True))


def _description(src: DatasetReader, index: int) -> str:
    """Return the description of a band; for netCDF the name of the variable."""
    text = src.descriptions[index] or ''
    return src.tags(index + 1).get('NETCDF_VARNAME', '') if src.driver == 'netCDF' else text


def band_name(text: str, sensor: Sensor) -> str | None:
    """Find the name of a band in its description.

    Args:
        text: Description, e.g. 'B4, central wavelength 665 nm', 'Sigma0_VV_dB' or 'red'.
        sensor: The sensor.

    Returns:
        Name of the channel; None if the description matches no band of the sensor.
    """
    exact = sensor.find_band(text)
    if exact is not None or not text:
        return exact
    match = re.match(r'B0*(\d{1,2})(A?)(?![0-9A-Z])', text.upper())
    if match is not None:
        # 'B08', but 'B8A'.
        return sensor.find_band(f'B{match[1]}A' if match[2] else f'B{int(match[1]):02d}')
    # A band name within the description, if there is only one.
    found = {
        sensor.channel(band.name)
        for band in sensor.bands
        for name in (band.name, *band.aliases)
        if len(name) > 1 and re.search(_as_word(name), text.upper())
    }
    return found.pop() if len(found) == 1 else None


def _as_word(name: str) -> str:
    """Return a pattern for a name as a word of its own. 'VV' may be followed by digits."""
    after = '0-9A-Z' if name[-1].isdigit() else 'A-Z'
    return rf'(?<![A-Z]){re.escape(name.upper())}(?![{after}])'
