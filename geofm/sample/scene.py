"""Simulate the Sentinel-1 and Sentinel-2 images of a landscape on a day."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geofm.sample.landscape import Landscape, smooth_noise
from geofm.sample.surfaces import Floats, green_fraction, spectra, surface_index, surface_values
from geofm.sensors import SENTINEL2

#: Equivalent number of looks of a high-resolution Sentinel-1 IW GRD product.
LOOKS = 4.4

# Centre wavelengths in micrometres of Sentinel-2's bands (ESA).
_WAVELENGTH = np.array(
    [0.443, 0.490, 0.560, 0.665, 0.705, 0.740, 0.783, 0.842, 0.865, 0.945, 1.375, 1.610, 2.190],
    np.float32,
)
#: Native pixel sizes in metres of Sentinel-2's bands (ESA).
NATIVE_PIXEL_SIZES = (60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 60, 20, 20)
# Brightness of a thick water cloud relative to the blue band: white up to the near infrared, dark
# where water absorbs.
_CLOUD = np.array(
    [1.0, 1.0, 0.97, 0.99, 1.0, 1.02, 1.03, 1.0, 1.05, 0.5, 0.03, 0.62, 0.42], np.float32
)
_CIRRUS = SENTINEL2.band_names.index('B10')
_WATER_VAPOUR = SENTINEL2.band_names.index('B09')


@dataclass(frozen=True)
class Region:
    """Properties of a region that do not change between dates.

    Attributes:
        tint: Factor per surface and Sentinel-2 band, of shape (surfaces, 13), since soils, plants
            and roofs differ between regions.
        incidence: Offset of all Sentinel-1 backscatter due to the incidence angle, in dB.
    """

    tint: Floats
    incidence: float


def draw_region(rng: np.random.Generator) -> Region:
    """Draw the properties of a region of interest.

    Args:
        rng: Source of randomness.

    Returns:
        The region.
    """
    shape = (len(surface_values('grain')), len(SENTINEL2.bands))
    # Overall brightness, a slope over the wavelengths, and small differences between bands.
    slope = (_WAVELENGTH - _WAVELENGTH.mean()) / _WAVELENGTH.std()
    tint = 0.05 * rng.standard_normal((shape[0], 1)) + 0.015 * rng.standard_normal(shape)
    tint = tint + 0.03 * rng.standard_normal((shape[0], 1)) * slope
    return Region(np.exp(tint).astype(np.float32), float(rng.uniform(-1.5, 1.5)))


def sentinel1(rng: np.random.Generator, landscape: Landscape, region: Region, day: float) -> Floats:
    """Simulate a Sentinel-1 image of a landscape.

    Speckle is multiplicative and gamma distributed with `LOOKS` looks. It is independent between
    pixels and polarisations.

    Args:
        rng: Source of randomness.
        landscape: The landscape.
        region: Properties of the region.
        day: Day of the year.

    Returns:
        VV and VH in dB, of shape (2, H, W).
    """
    kind = landscape.surface
    green = green_fraction(kind, day - landscape.delay)
    moisture = rng.uniform(-2.5, 2.5) * surface_values('moisture')[kind]
    # Wind roughens water, which raises VV more than VH.
    wind = rng.gamma(1.2, 1.3) * (kind == surface_index('water'))
    growth = surface_values('growth')[kind]
    image = np.empty((2, *landscape.unit.shape), np.float32)
    for channel, (name, of_wind) in enumerate((('vv', 1.0), ('vh', 0.35))):
        level = surface_values(name)[kind] + growth[:, channel] * green
        level = level + moisture + of_wind * wind + region.incidence
        level = level.astype(np.float32)[landscape.unit] + landscape.backscatter
        speckle = rng.standard_gamma(LOOKS, landscape.unit.shape, np.float32) / np.float32(LOOKS)
        image[channel] = level + 10 * np.log10(np.maximum(speckle, 1e-6))
    return image


def _reflectance(landscape: Landscape, region: Region, day: float) -> Floats:
    """Compute the spectra of the ground without illumination and atmosphere, (13, H, W)."""
    kind = landscape.surface
    bare, green = (spectrum * region.tint for spectrum in spectra(day))
    fraction = green_fraction(kind, day - landscape.delay)[:, None]
    change = (green - bare)[kind] * landscape.gain[:, None]
    level = bare[kind] * landscape.gain[:, None] + change * fraction
    # Sparse vegetation varies little in density.
    change = change * np.minimum(1, 0.25 + fraction)
    image = np.empty((len(SENTINEL2.bands), *landscape.unit.shape), np.float32)
    for band in range(len(image)):
        image[band] = level[:, band][landscape.unit]
        image[band] += change[:, band][landscape.unit] * landscape.vigour
    return image


def _clouds(
    rng: np.random.Generator, shape: tuple[int, int], cover: float
) -> tuple[Floats, Floats]:
    """Draw the opacity of clouds and of their shadows, 0 to 1, each of shape (H, W)."""
    if cover <= 0:
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    field = smooth_noise(rng, shape, min(shape) / 4, 2.2)
    opacity = np.clip((field - np.quantile(field, 1 - cover)) / 0.7 + 0.3, 0, 1)
    height = rng.uniform(12, 30)
    shadow = np.roll(opacity, (-round(height * 0.8), -round(height * 0.6)), (0, 1))
    return opacity, shadow


def sentinel2(
    rng: np.random.Generator, landscape: Landscape, region: Region, day: float, cover: float
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Simulate a Sentinel-2 image of a landscape.

    Args:
        rng: Source of randomness.
        landscape: The landscape.
        region: Properties of the region.
        day: Day of the year.
        cover: Cloud-covered fraction, 0 to 1.

    Returns:
        Level-1C digital numbers, uint16 of shape (13, H, W), and a cloud mask, bool of shape (H,
        W).
    """
    # Only what generates samples needs it.
    from scipy.ndimage import uniform_filter

    shape = landscape.unit.shape
    image = _reflectance(landscape, region, day)
    # The sun is in the south, lower in winter, and illuminates slopes that face it.
    winter = -np.cos(2 * np.pi * (day - 172) / 365.25)
    light = 1 + landscape.brightness + 0.03 * (1.5 + winter) * landscape.slope
    gain = rng.uniform(0.87, 1.13)
    haze = rng.gamma(1.5, 90) * (_WAVELENGTH / _WAVELENGTH[0]) ** -1.6
    vapour = rng.uniform(0.6, 1.3)
    opacity, shadow = _clouds(rng, shape, cover)
    light *= gain * (1 - 0.55 * shadow)
    top = 9500 * (0.75 + 0.35 * rng.random()) * (1 + 0.13 * smooth_noise(rng, shape, 30, 2))
    for band, (pixels, size) in enumerate(zip(image, NATIVE_PIXEL_SIZES, strict=True)):
        pixels *= light * (vapour if band == _WATER_VAPOUR else 1)
        pixels += haze[band] if band != _CIRRUS else 0
        pixels += opacity * (_CLOUD[band] * top - pixels)
        if size > 10:
            # The width must be odd, or the band would be shifted against the others.
            uniform_filter(pixels, size // 10 | 1, output=pixels, mode='nearest')
        pixels *= 1 + 0.012 * rng.standard_normal(shape, np.float32)
        pixels += 4 * rng.standard_normal(shape, np.float32)
    # The darkest value of Level-1C is 1, as 0 is nodata.
    return np.clip(np.rint(image), 1, 65535).astype(np.uint16), opacity > 0.3
