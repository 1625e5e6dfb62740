"""Dataclasses that define a sensor."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from geofm.sensors.plain import SensorError, from_plain, to_plain

#: Lowest and highest value of a range.
type Range = tuple[float, float]

#: Quantity that a sensor measures.
Quantity = Literal['reflectance', 'backscatter', 'elevation', 'image', 'other']

#: Resampling methods for warping, by their names in :class:`rasterio.enums.Resampling`.
RESAMPLING = ('nearest', 'bilinear', 'cubic', 'cubic_spline', 'lanczos', 'average', 'mode')

_KEY = re.compile(r'[a-z][a-z0-9_]{0,31}')
_BAND_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,31}')
_DIFFERENCE = re.compile(r'\s*(\S+?)\s+[-−]\s+(\S+?)\s*')

#: Maximum number of bins of a histogram.
_MOST_BINS = 1 << 24


@dataclass(frozen=True, slots=True)
class Band:
    """Band of a sensor.

    Attributes:
        name: Name without the sensor, as in files, e.g. ``'VV'`` or ``'B8A'``.
        mean: Mean over a large data set, in the unit of the sensor, the default for normalisation.
        std: Standard deviation over the same data set, in the unit of the sensor.
        common_name: Common name of the STAC EO extension, e.g. ``'red'``.
        wavelength: Centre wavelength in µm.
        gsd: Ground sample distance in metres.
        aliases: Further names that files and catalogues give the band.
    """

    name: str
    mean: float
    std: float
    common_name: str | None = None
    wavelength: float | None = None
    gsd: float | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SensorError: If the name or a number is invalid.
        """
        if not _BAND_NAME.fullmatch(self.name):
            raise SensorError(
                f'band name {self.name!r} must consist of at most 32 letters, digits, _ and -'
            )
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise SensorError(
                f'band {self.name}: mean must be finite and std positive, '
                f'not {self.mean} and {self.std}'
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The name, the common name and the aliases."""
        common = () if self.common_name is None else (self.common_name,)
        return (self.name, *common, *self.aliases)


@dataclass(frozen=True, slots=True)
class SensorPhotometry:
    """Random photometric augmentation of the crops of a sensor. None disables a change.

    A value v in physical units (reflectance, dB, metres) becomes ``gain * v + offset``.

    Attributes:
        gain: Range of a gain shared by all bands of a crop.
        band_gain: Range of a further gain per band.
        offset: Range of an offset shared by all bands of a crop, in physical units.
        band_offset: Range of a further offset per band, in physical units.
        probability: Probability of changing the gain and offset of a crop.
        looks: Range of the number of looks of additional multiplicative speckle, at least 4.
        speckle_probability: Probability of adding speckle to a crop.
        blur: Range of the standard deviation of the Gaussian blur, in pixels of a crop.
    """

    gain: Range | None = None
    band_gain: Range | None = None
    offset: Range | None = None
    band_offset: Range | None = None
    probability: float = 0.8
    looks: Range | None = None
    speckle_probability: float = 0.5
    blur: Range | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SensorError: If a range is reversed, a probability is not within 0 and 1, or the number
                of looks is below 4.
        """
        for name in ('gain', 'band_gain', 'offset', 'band_offset', 'looks', 'blur'):
            limits = getattr(self, name)
            if limits is not None and not limits[0] <= limits[1]:
                raise SensorError(f'photometry: {name} {list(limits)} must be [lowest, highest]')
        for name in ('probability', 'speckle_probability'):
            if not 0 <= getattr(self, name) <= 1:
                raise SensorError(f'photometry: {name} must be within 0 and 1')
        if self.looks is not None and self.looks[0] < 4:
            raise SensorError(f'photometry: looks must be at least 4, got {list(self.looks)}')

    @property
    def is_affine(self) -> bool:
        """Whether there are gains or offsets."""
        changes = (self.gain, self.band_gain, self.offset, self.band_offset)
        return any(change is not None for change in changes)


@dataclass(frozen=True, slots=True)
class Drawing:
    """Picture of the bands of a sensor for display.

    Attributes:
        channels: Red, green and blue, or a single channel for a colour map. Each is a band or the
            difference of two bands, e.g. ``'VV - VH'``.
        title: Title of the picture, e.g. ``'true colour'``.
        cmap: Matplotlib colour map for a single channel.
    """

    channels: tuple[str, ...]
    title: str
    cmap: str = 'gray'

    def __post_init__(self) -> None:
        """Check the number of channels.

        Raises:
            SensorError: If the number of channels is neither one nor three.
        """
        if len(self.channels) not in (1, 3):
            raise SensorError(f'drawing: give one or three channels, not {list(self.channels)}')

    @property
    def terms(self) -> tuple[tuple[str, str | None], ...]:
        """Band of each channel, and the band to subtract, or None."""
        return tuple(_terms(channel) for channel in self.channels)

    @property
    def bands(self) -> tuple[str, ...]:
        """Unique names of the required bands."""
        return tuple(dict.fromkeys(b for terms in self.terms for b in terms if b is not None))


def _terms(channel: str) -> tuple[str, str | None]:
    match = _DIFFERENCE.fullmatch(channel)
    return (channel.strip(), None) if match is None else (match[1], match[2])


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bins of histograms for computing percentiles, in the unit of the sensor.

    Attributes:
        first: Centre of the first bin.
        width: Width of a bin, which is the resolution of the percentiles.
        bins: Number of bins. Values outside the range are counted in the first and last bin.
    """

    first: float
    width: float
    bins: int

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SensorError: If the width or the number of bins is not positive, or there are too many
                bins.
        """
        if not (math.isfinite(self.first) and self.width > 0 and 1 <= self.bins <= _MOST_BINS):
            raise SensorError(
                f'histogram: needs a finite first, a positive width and 1 to {_MOST_BINS} bins, '
                f'not {self.first}, {self.width} and {self.bins}'
            )


# Placeholder for defaults that depend on the quantity, replaced in Sensor.__post_init__.
_BY_QUANTITY: Any = None


@dataclass(frozen=True, slots=True)
class Sensor:
    """A sensor, or a product derived from a sensor, with its bands.

    Most fields from *limits* on have defaults that depend on *quantity* and *unit*.

    Attributes:
        name: Key of the sensor, e.g. ``'s1'``: lower-case letters, digits and underscores.
        title: Name to display. Its first word is used as a short name.
        bands: Bands, in the order of files that do not name their bands.
        quantity: Measured quantity: 'reflectance', 'backscatter', 'elevation', 'image' (8-bit
            brightness without calibration) or 'other'.
        unit: Unit of pixel values in geofm: 'DN' for reflectance as integers, 'dB' or 'power' for
            backscatter, 'm' for elevation, or any text.
        scale: Factor from pixel values to the physical quantity, e.g. 1e-4 for DN = reflectance x
            10,000.
        offset: Offset that is added after multiplication by *scale*.
        limits: Lowest and highest valid pixel value, in the unit of the sensor.
        measures_zero: Whether 0 in a single band is a measurement.
        fills_zero: Whether 0 in all bands is fill, even if a file does not state a nodata value.
        nodata: Nodata values, in addition to the nodata value that a file states.
        dtypes: Data types that files of the sensor can have; empty for any.
        baseline_offset: Offset that newer processing baselines add to every DN, 1,000 for
            Sentinel-2 since 04.00. It is subtracted if a file or table states it.
        photometry: Photometric augmentation.
        resampling: Resampling method for warping, one of :data:`RESAMPLING`.
        histogram: Bins for percentiles.
        drawing: How to draw the sensor: channels, title and colour map.
        static: Whether the sensor does not change with time, so that all dates match.
        qualified: Whether names of channels have the sensor in front, e.g. ``'landsat.B02'``. Only
            False for Sentinel-1 and Sentinel-2 Level-1C, whose bands have the same names as in
            TorchGeo.
        grid_priority: Priority for the choice of the sensor whose grid the others are warped onto.
            The highest number wins; among several, the sensor registered first.
    """

    name: str
    title: str
    bands: tuple[Band, ...]
    quantity: Quantity
    unit: str
    scale: float = 1.0
    offset: float = 0.0
    limits: Range = _BY_QUANTITY
    measures_zero: bool = _BY_QUANTITY
    fills_zero: bool = _BY_QUANTITY
    nodata: tuple[float, ...] = ()
    dtypes: tuple[str, ...] = ()
    baseline_offset: float = 0.0
    photometry: SensorPhotometry = _BY_QUANTITY
    resampling: str = 'bilinear'
    histogram: Histogram = _BY_QUANTITY
    drawing: Drawing = _BY_QUANTITY
    static: bool = False
    qualified: bool = True
    grid_priority: int = field(default=_BY_QUANTITY)

    def __post_init__(self) -> None:
        """Set the defaults of the quantity, and check the definition.

        Raises:
            SensorError: If the definition is invalid.
        """
        self._check()
        for name, value in _defaults(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        unknown = [band for band in self.drawing.bands if band not in self.short_names]
        if unknown:
            raise SensorError(f'sensor {self.name}: drawing of unknown bands {unknown}')

    def _check(self) -> None:
        if not _KEY.fullmatch(self.name):
            raise SensorError(
                f'sensor {self.name!r}: a key consists of lower-case letters, digits and '
                'underscores, starts with a letter, and has 32 characters at most'
            )
        if self.quantity not in get_args(Quantity):
            raise SensorError(
                f'sensor {self.name}: quantity {self.quantity!r} must be one of '
                f'{", ".join(get_args(Quantity))}'
            )
        if not self.title.strip():
            raise SensorError(f'sensor {self.name}: the title is empty')
        if not self.bands:
            raise SensorError(f'sensor {self.name}: has no bands')
        lower = [name.lower() for name in self.short_names]
        twice = sorted({name for name in lower if lower.count(name) > 1})
        if twice:
            raise SensorError(f'sensor {self.name}: bands given twice: {twice}')
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.offset)):
            raise SensorError(
                f'sensor {self.name}: scale must be positive and offset finite, '
                f'not {self.scale} and {self.offset}'
            )
        # Before the defaults are set, which depend on the limits.
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise SensorError(
                f'sensor {self.name}: limits {list(self.limits)} must be [lowest, highest]'
            )
        if self.resampling not in RESAMPLING:
            raise SensorError(
                f'sensor {self.name}: resampling {self.resampling!r} must be one of '
                f'{", ".join(RESAMPLING)}'
            )

    @property
    def short_names(self) -> tuple[str, ...]:
        """Names of the bands without the sensor, in file order."""
        return tuple(band.name for band in self.bands)

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of the channels in file order, as used throughout geofm."""
        return tuple(self.channel(band.name) for band in self.bands)

    @property
    def short_title(self) -> str:
        """First word of the title, for legends and menus."""
        return self.title.split()[0]

    @property
    def picture_title(self) -> str:
        """Short title of the sensor and title of its picture, for a panel of a figure."""
        if self.drawing.title.lower() == self.short_title.lower():
            return self.short_title
        return f'{self.short_title} {self.drawing.title}'

    @property
    def picture_bands(self) -> tuple[str, ...]:
        """Names of the channels required for :attr:`drawing`."""
        return tuple(self.channel(band) for band in self.drawing.bands)

    def channel(self, band: str) -> str:
        """Return the name of the channel of a band.

        Args:
            band: Name of the band without the sensor.

        Returns:
            The name, with the sensor in front if the sensor is qualified.
        """
        return f'{self.name}.{band}' if self.qualified else band

    def find_band(self, text: str) -> str | None:
        """Find a band by any of its names.

        Args:
            text: Name of a band with or without the sensor, its common name or an alias, in upper
                or lower case.

        Returns:
            Name of the channel; None if no band of this sensor has this name.
        """
        name = text.strip().lower().removeprefix(f'{self.name}.')
        # Names take precedence over aliases of other bands.
        for names_of in (lambda band: (band.name,), lambda band: band.names):
            for band in self.bands:
                if name in (known.lower() for known in names_of(band)):
                    return self.channel(band.name)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Convert the definition to plain data, for YAML and checkpoints.

        Returns:
            Fields by name: only strings, numbers, lists and dictionaries. :meth:`from_dict` makes
            an equal sensor from them.
        """
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, definition: Mapping[str, Any]) -> Self:
        """Make a sensor from its definition.

        Args:
            definition: Fields by name, see :meth:`to_dict`; not trusted.

        Returns:
            The sensor.

        Raises:
            SensorError: If a field is missing, unknown or of another type.
        """
        name = definition.get('name') if isinstance(definition, Mapping) else None
        return from_plain(cls, definition, f'sensor {name}' if isinstance(name, str) else 'sensor')


def _defaults(sensor: Sensor) -> dict[str, Any]:
    """Return the default values of fields that depend on the quantity."""
    quantity, decibel = sensor.quantity, sensor.unit == 'dB'
    limits: Range
    photometry = SensorPhotometry()
    if quantity == 'reflectance':
        limits = _to_unit(sensor, -0.1), _to_unit(sensor, 6.5535)
        photometry = SensorPhotometry(
            gain=(0.8, 1.2), band_gain=(0.95, 1.05), offset=(0.0, 0.03), blur=(0.1, 2.0)
        )
    elif quantity == 'backscatter':
        # Thermal noise is near -30 dB, and corner reflectors are near 30 dB. Processors may clip
        # power at 1e-10.
        limits = (-100.0, 100.0) if decibel else (0.0, 1e10)
        photometry = SensorPhotometry(
            offset=(-1.5, 1.5) if decibel else None,
            band_offset=(-0.5, 0.5) if decibel else None,
            gain=None if decibel else (0.7, 1.4),
            band_gain=None if decibel else (0.9, 1.1),
            looks=(4.0, 32.0),
            # Equivalent to mild multilooking. More would remove point targets as well as speckle.
            blur=(0.1, 1.0),
        )
    elif quantity == 'elevation':
        # From below the Mariana Trench to above Mount Everest.
        limits = (-11_500.0, 9_500.0)
        photometry = SensorPhotometry(offset=(-10.0, 10.0))
    elif quantity == 'image':
        limits = (0.0, 255.0)
        photometry = SensorPhotometry(
            gain=(0.8, 1.2), band_gain=(0.95, 1.05), offset=(-8.0, 8.0), blur=(0.1, 2.0)
        )
    else:
        limits = (-3e38, 3e38)
    return {
        'limits': limits,
        'measures_zero': quantity != 'backscatter',
        'fills_zero': quantity in ('reflectance', 'backscatter'),
        'photometry': photometry,
        'histogram': _histogram(sensor, limits if sensor.limits is None else sensor.limits),
        'drawing': _drawing(sensor),
        'grid_priority': -1 if sensor.static else 0,
    }


def _to_unit(sensor: Sensor, value: float) -> float:
    """Convert a physical value to the unit of the sensor."""
    return round((value - sensor.offset) / sensor.scale, 6)


def _histogram(sensor: Sensor, limits: Range) -> Histogram:
    match sensor.quantity:
        case 'backscatter' if sensor.unit == 'dB':
            return Histogram(-100.0, 0.01, 15_000)
        case 'elevation':
            return Histogram(-1_000.0, 0.25, 40_000)
        case 'image':
            return Histogram(0.0, 1.0, 256)
        case 'reflectance' if sensor.scale < 1:
            return Histogram(0.0, 1.0, 65_536)
    # Beyond ten standard deviations, a coarse resolution suffices.
    low = max(limits[0], min(band.mean - 10 * band.std for band in sensor.bands))
    high = min(limits[1], max(band.mean + 10 * band.std for band in sensor.bands))
    if not low < high:
        low, high = limits
    return Histogram(low, (high - low) / 65_535, 65_536)


def _drawing(sensor: Sensor) -> Drawing:
    """Return a true-colour picture if bands have common names, else one of the first bands."""
    common = {band.common_name: band.name for band in sensor.bands}
    if {'red', 'green', 'blue'} <= common.keys():
        return Drawing((common['red'], common['green'], common['blue']), 'true colour')
    if len(sensor.bands) >= 3:
        names = sensor.short_names[:3]
        return Drawing(names, ', '.join(names))
    cmap = 'terrain' if sensor.quantity == 'elevation' else 'gray'
    return Drawing(sensor.short_names[:1], sensor.short_names[0], cmap)
