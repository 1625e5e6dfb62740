"""Read arrays of NPY, HDF5, netCDF and Zarr files as rasters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.sensors import SENSORS, Sensor

_ADDRESS = re.compile(r'(?:netcdf|hdf5|zarr):"([^"]+)"(?::/*(.*?))?((?::\d+)*)', re.IGNORECASE)

#: Names of variables with coordinates or the CRS, which are not images.
_COORDINATES = {
    'x',
    'y',
    'lat',
    'lon',
    'latitude',
    'longitude',
    'time',
    'band',
    'spatial_ref',
    'crs',
}

#: Largest deviation of coordinates from regular spacing, as a fraction of the spacing.
_EVEN = 0.01


class Array(Protocol):
    """Array in a file."""

    shape: tuple[int, ...]
    ndim: int
    dtype: Any
    attrs: Mapping[str, Any]

    def __getitem__(self, key: Any) -> Any:
        """Read a part of the array."""


class Group(Protocol):
    """Group of arrays in a file."""

    attrs: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return an array or group."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the members."""

    def __contains__(self, name: object) -> bool:
        """Check whether a member exists."""


class ArrayAddress(NamedTuple):
    """Address of an array in a file, or of a part of it.

    Attributes:
        file: The file.
        name: Name of the array including its groups; '' to choose it automatically.
        lead: Indices into its first dimensions.
    """

    file: str
    name: str
    lead: tuple[int, ...]

    @classmethod
    def parse(cls, address: str) -> 'ArrayAddress':
        """Parse an address.

        Args:
            address: A file, or ``HDF5:"file.h5"://group/array``, ``ZARR:"store.zarr":/array:3``
                (index 3 of the first dimension) or ``NETCDF:"file.nc":variable``.

        Returns:
            The parts of the address.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            return cls(address, '', ())
        lead = tuple(int(i) for i in match[3].split(':')[1:])
        return cls(match[1], match[2] or '', lead)


@dataclass(frozen=True)
class Layer:
    """Band of an array.

    Attributes:
        array: The array.
        lead: Indices into all dimensions except rows and columns.
        last: Whether the last index of *lead* is for a dimension after rows and columns.
        description: Name of the band.
        scale: Factor of the stored numbers.
        offset: Offset, added after scaling.
        unit: Unit of the result.
        nodata: Nodata value.
    """

    array: Array
    lead: tuple[int, ...]
    last: bool = False
    description: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    unit: str | None = None
    nodata: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        rows, cols = self.array.shape[-3:-1] if self.last else self.array.shape[-2:]
        return rows, cols

    def read(self, rows: slice, cols: slice) -> npt.NDArray[Any]:
        """Read the numbers of a window."""
        if self.last:
            key = (*self.lead[:-1], rows, cols, self.lead[-1])
        else:
            key = (*self.lead, rows, cols)
        return np.asarray(self.array[key])


class ArraySource:
    """Layers of arrays as a :class:`~geofm.datasets.readers.source.Source`."""

    def __init__(
        self,
        name: str,
        driver: str,
        layers: Sequence[Layer],
        georeference: tuple[CRS, Affine] | None = None,
        file: Any = None,
    ) -> None:
        """Initialize a new ArraySource instance.

        Args:
            name: Address of the raster.
            driver: Name of the format.
            layers: Bands, all of the same shape.
            georeference: CRS and transform; None if it is not georeferenced.
            file: Open file, which is closed with the source.

        Raises:
            ValueError: If the bands have different shapes, or there are none.
        """
        shapes = {layer.shape for layer in layers}
        if len(shapes) != 1:
            raise ValueError(f'{name}: bands have different shapes: {sorted(shapes)}')
        self.name, self.driver, self._layers, self._file = name, driver, list(layers), file
        self.height, self.width = next(iter(shapes))
        self.count = n = len(self._layers)
        self.crs: CRS | None = None if georeference is None else georeference[0]
        self.transform = Affine.identity() if georeference is None else georeference[1]
        self.dtypes: Sequence[str] = [np.dtype(layer.array.dtype).name for layer in layers]
        self.descriptions: Sequence[str | None] = [layer.description for layer in layers]
        self.scales: Sequence[float] = [layer.scale for layer in layers]
        self.offsets: Sequence[float] = [layer.offset for layer in layers]
        self.units: Sequence[str | None] = [layer.unit for layer in layers]
        self.nodatavals: Sequence[float | None] = [layer.nodata for layer in layers]
        self.colorinterp: Sequence[ColorInterp] = [ColorInterp.undefined] * n
        self.mask_flag_enums: Sequence[Sequence[MaskFlags]] = [[MaskFlags.all_valid]] * n
        self.block_shapes: Sequence[tuple[int, int]] = [(min(256, self.height), self.width)] * n

    def read(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[Any]:
        """Read the numbers of bands, counted from 1, in a window of whole pixels."""
        rows, cols = slice(0, self.height), slice(0, self.width)
        if window is not None:
            col, row, width, height = (int(side) for side in window.flatten())
            rows, cols = slice(row, row + height), slice(col, col + width)
        if isinstance(indexes, int):
            return self._layers[indexes - 1].read(rows, cols)
        layers = [self._layers[i - 1] for i in indexes]
        together = _adjacent(layers)
        if together is not None:
            # Read adjacent bands at once, as they may share a compressed chunk.
            first, lead = layers[0], (*layers[0].lead[:-1],)
            pixels = np.asarray(
                first.array[(*lead, rows, cols, together)]
                if first.last
                else first.array[(*lead, together, rows, cols)]
            )
            pixels = np.moveaxis(pixels, -1, 0) if first.last else pixels
            order = [layer.lead[-1] - together.start for layer in layers]
            return np.ascontiguousarray(pixels[order])
        return np.stack([layer.read(rows, cols) for layer in layers])

    def read_masks(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[np.uint8]:
        """Return a mask that is valid everywhere, as arrays have none."""
        return np.full(self.read(indexes, window=window).shape, 255, np.uint8)

    def tags(self, bidx: int = 0, ns: str | None = None) -> dict[str, str]:
        """Return further metadata, which arrays do not have."""
        return {}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _adjacent(layers: Sequence[Layer]) -> slice | None:
    """Return the range of bands of one array, unless less than half of the range is needed."""
    first = layers[0] if layers else None
    if first is None or not first.lead or len(layers) == 1:
        return None
    if any(
        layer.array is not first.array
        or layer.last != first.last
        or layer.lead[:-1] != first.lead[:-1]
        for layer in layers
    ):
        return None
    numbers = [layer.lead[-1] for layer in layers]
    span = slice(min(numbers), max(numbers) + 1)
    return span if span.stop - span.start <= 2 * len(layers) else None


def layers_of(
    array: Array,
    lead: tuple[int, ...],
    sensor: Sensor | None,
    name: str,
    names: Sequence[str] | None = None,
) -> list[Layer]:
    """Return the bands of an array.

    Args:
        array: The array, with two or more dimensions after *lead*: rows, columns and bands. Further
            dimensions are treated as bands.
        lead: Indices into its first dimensions.
        sensor: Sensor, if known. The axis whose length is its number of bands is the band axis.
        name: Address, for error messages.
        names: Names of its bands.

    Returns:
        Its bands.

    Raises:
        ValueError: If the array has too few dimensions, or an index is out of range.
    """
    rest = array.shape[len(lead) :]
    if any(i >= n for i, n in zip(lead, array.shape, strict=False)) or len(rest) < 2:
        raise ValueError(
            f'{name}: an array of shape {tuple(array.shape)} has no rows and columns at index '
            f'{list(lead)}'
        )
    facts = _facts(array.attrs)
    if len(rest) == 2:
        return [Layer(array, lead, False, names[0] if names else None, *facts)]
    if len(rest) > 3:
        # Flatten all dimensions before the band axis.
        more = [(*lead, *index) for index in np.ndindex(rest[:-3])]
        return [layer for index in more for layer in layers_of(array, index, sensor, name, names)]
    last = _is_last(rest, sensor, names)
    count = rest[-1] if last else rest[0]
    known = list(names) if names is not None and len(names) == count else [None] * count
    return [Layer(array, (*lead, i), last, known[i], *facts) for i in range(count)]


def _is_last(shape: tuple[int, ...], sensor: Sensor | None, names: Sequence[str] | None) -> bool:
    """Check whether the last of three axes is the band axis."""
    counts = [len(names)] if names else [] if sensor is None else [len(sensor.bands)]
    for count in counts:
        if (shape[0] == count) != (shape[2] == count):
            return shape[2] == count
    return shape[2] < min(shape[:2])


def _facts(attrs: Mapping[str, Any]) -> tuple[float, float, str | None, float | None]:
    """Return scale, offset, unit and nodata by the CF conventions."""
    fill = attrs.get('_FillValue', attrs.get('missing_value'))
    unit = attrs.get('units')
    return (
        float(_scalar(attrs.get('scale_factor', 1.0))),
        float(_scalar(attrs.get('add_offset', 0.0))),
        _text(unit) if unit is not None else None,
        None if fill is None else float(_scalar(fill)),
    )


def _scalar(value: Any) -> Any:
    array = np.asarray(value)
    return array.reshape(-1)[0] if array.size else np.nan


def _text(value: Any) -> str:
    value = _scalar(value)
    return value.decode(errors='replace') if isinstance(value, bytes) else str(value)


def choose(group: Group, name: str, sensor: Sensor | None, address: str) -> list[str]:
    """Choose the arrays of a group to read.

    Args:
        group: The group.
        name: Name of an array; '' to choose automatically.
        sensor: The requested sensor.
        address: Address, for error messages.

    Returns:
        Names of the arrays: the one named like the sensor or 'bands', or else those named like
        bands of the sensor, or else the only array.

    Raises:
        ValueError: If the choice is ambiguous.
    """
    if name:
        if name not in group:
            raise ValueError(f'{address}: no array {name}; it has {", ".join(_images(group))}')
        return [name]
    images = _images(group)
    wanted = [] if sensor is None else [sensor.name]
    for like in (*wanted, 'bands'):
        if found := [n for n in images if n.rpartition('/')[2].lower() == like]:
            return found[:1]
    if sensor is not None:
        bands = [n for n in images if sensor.find_band(n.rpartition('/')[2])]
        if bands:
            return bands
    if len(images) != 1:
        raise ValueError(
            f'{address}: has {", ".join(images) or "no array of rows and columns"}; name an '
            f'array like the sensor, or give one as HDF5:"FILE"://NAME or ZARR:"FILE":/NAME'
        )
    return images


def _images(group: Group, prefix: str = '', depth: int = 3) -> list[str]:
    """List the arrays with rows and columns below a group."""
    found = []
    for name in sorted(group):
        member = group[name]
        if hasattr(member, 'shape'):
            if name.lower() not in _COORDINATES and len(member.shape) >= 2:
                found.append(prefix + name)
        elif depth:
            found += _images(member, f'{prefix}{name}/', depth - 1)
    return found


def open_group(
    group: Group, address: str, where: ArrayAddress, key: str | None, driver: str, file: Any
) -> ArraySource:
    """Open arrays of a group as one raster.

    Args:
        group: The group.
        address: Address, for messages.
        where: The parsed address.
        key: Name of the requested sensor.
        driver: Name of the format.
        file: Open file, which is closed with the source.

    Returns:
        The raster.

    Raises:
        ValueError: If the choice of arrays is ambiguous, or they are not a raster.
    """
    sensor = None if key is None else SENSORS[key]
    layers, place = [], None
    for name in choose(group, where.name, sensor, address):
        array = group[name]
        parent = group[name.rpartition('/')[0]] if '/' in name.strip('/') else group
        names = _band_names(parent)
        found = layers_of(array, where.lead, sensor, address, names)
        if len(found) == 1 and found[0].description is None:
            found = [_named(found[0], name.rpartition('/')[2])]
        layers += found
        place = place or georeference(parent, array, where.lead)
    return ArraySource(address, driver, layers, place, file)


def _named(layer: Layer, name: str) -> Layer:
    return replace(layer, description=name)


def _band_names(group: Group) -> list[str] | None:
    """Return the names in the band coordinate."""
    if 'band' not in group or group['band'].ndim != 1:
        return None
    return [v.decode() if isinstance(v, bytes) else str(v) for v in group['band'][:].tolist()]


def georeference(group: Group, array: Array, lead: tuple[int, ...]) -> tuple[CRS, Affine] | None:
    """Return CRS and transform of an array by the CF conventions.

    Args:
        group: The group of the array, with its coordinates ``x`` and ``y``.
        array: The array.
        lead: Indices into its first dimensions, which coordinates may have too.

    Returns:
        CRS and transform; None if there is no CRS, or coordinates are missing or not regularly
        spaced.
    """
    crs = _crs(group, array, lead)
    for x_name, y_name in (('x', 'y'), ('lon', 'lat'), ('longitude', 'latitude')):
        if crs is None or x_name not in group or y_name not in group:
            continue
        x, y = (_axis(group[name], lead) for name in (x_name, y_name))
        if x is None or y is None:
            return None
        (left, width), (top, height) = x, y
        return crs, Affine(width, 0, left - width / 2, 0, height, top - height / 2)
    return None


def _axis(array: Array, lead: tuple[int, ...]) -> tuple[float, float] | None:
    """Return first value and spacing of a coordinate."""
    values = np.asarray(array[lead[: array.ndim - 1]] if array.ndim > 1 else array[:], np.float64)
    if values.ndim != 1 or len(values) < 2:
        return None
    step = (values[-1] - values[0]) / (len(values) - 1)
    even = values[0] + step * np.arange(len(values))
    if not step or not np.abs(values - even).max() <= _EVEN * abs(step):
        return None
    return float(values[0]), float(step)


def _crs(group: Group, array: Array, lead: tuple[int, ...]) -> CRS | None:
    """Return the CRS of an array."""
    mapping = array.attrs.get('grid_mapping', group.attrs.get('grid_mapping'))
    names = [_text(mapping)] if mapping is not None else []
    for name in (*names, 'spatial_ref', 'crs'):
        if name not in group:
            continue
        member = group[name]
        for key in ('crs_wkt', 'spatial_ref', 'epsg_code', 'epsg'):
            if key in member.attrs and (crs := _parse_crs(member.attrs[key])) is not None:
                return crs
        if np.dtype(member.dtype).kind in 'iuSUOT':
            value = member[lead[: member.ndim]] if member.ndim else member[()]
            if (crs := _parse_crs(value)) is not None:
                return crs
    for attrs in (array.attrs, group.attrs):
        for key in ('crs_wkt', 'crs', 'epsg'):
            if key in attrs and (crs := _parse_crs(attrs[key])) is not None:
                return crs
    return None


def _parse_crs(value: Any) -> CRS | None:
    """Parse a CRS from WKT, an EPSG code or another definition."""
    text = _text(value)
    if text in ('0', ''):
        return None
    try:
        crs = CRS.from_user_input(int(text) if text.isdigit() else text)
        code = crs.to_epsg()
        return crs if code is None else CRS.from_epsg(code)
    except (CRSError, OverflowError, ValueError):
        return None
