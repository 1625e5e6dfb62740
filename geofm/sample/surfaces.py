"""Spectra, seasons and backscatter of the surfaces of the generated landscapes.

The numbers are realistic in magnitude only. Spectra are Sentinel-2 Level-1C digital numbers
(top-of-atmosphere reflectance x 10,000) similar to the class means of EuroSAT (Helber et al., 2019,
https://doi.org/10.1109/JSTARS.2019.2918242). The seasons of crops and their backscatter are
modelled after the Sentinel-1 and Sentinel-2 profiles of Veloso et al. (2017,
https://doi.org/10.1016/j.rse.2017.07.015), and the bright double bounce of flooded vegetation after
Tsyganskaya et al. (2018, https://doi.org/10.1080/01431161.2017.1420938).

Some surfaces look alike to one of the sensors on purpose, so that a model benefits from using both:

- For Sentinel-2, marsh looks like meadow, swamp forest like broad-leaved forest, and rock like the
  average of a town. Sentinel-1 distinguishes each pair by the double bounce.
- For Sentinel-1, sand looks like water, and grassland like crops. Their spectra differ.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geofm.sample.classes import class_value

type Floats = npt.NDArray[np.float32]

# Bands:      B01   B02   B03   B04   B05   B06   B07   B08   B8A   B09 B10  B11   B12
_MATERIALS: dict[str, tuple[int, ...]] = {
    'water': (1217, 948, 776, 505, 517, 399, 400, 331, 311, 95, 8, 112, 74),
    'broadleaf': (1121, 817, 690, 409, 706, 1988, 2582, 2529, 2915, 741, 9, 1263, 503),
    'twigs': (1220, 980, 900, 830, 1000, 1350, 1520, 1560, 1780, 560, 10, 1700, 1000),
    'conifer': (1100, 790, 610, 380, 600, 1500, 1850, 1850, 2050, 600, 9, 900, 380),
    'herbs': (1250, 950, 890, 590, 1130, 2850, 3550, 3520, 3950, 1190, 13, 1950, 900),
    'straw': (1400, 1250, 1300, 1450, 1800, 2250, 2480, 2500, 2760, 900, 15, 3000, 2050),
    'soil': (1430, 1270, 1270, 1380, 1620, 1850, 2020, 2030, 2280, 740, 14, 2700, 2050),
    'flowers': (1330, 1180, 1620, 1480, 1850, 2900, 3450, 3430, 3800, 1150, 13, 2050, 1000),
    'roofs': (1800, 1640, 1590, 1640, 1760, 2050, 2230, 2150, 2400, 620, 12, 2300, 1800),
    'asphalt': (1350, 1130, 1050, 1000, 1050, 1150, 1250, 1200, 1350, 400, 11, 1300, 1100),
    'rock': (1600, 1420, 1360, 1360, 1450, 1640, 1790, 1730, 1930, 540, 12, 1900, 1520),
    'sand': (1700, 1640, 1780, 2020, 2220, 2400, 2500, 2550, 2720, 850, 14, 3150, 2700),
}

# Green fraction by day of the year, interpolated linearly and periodically.
_SEASONS: dict[str, tuple[tuple[int, float], ...]] = {
    'none': ((1, 0.0),),
    'evergreen': ((1, 0.92), (170, 1.0), (300, 0.95)),
    'deciduous': ((1, 0.15), (95, 0.15), (135, 1.0), (260, 0.92), (310, 0.2)),
    'grass': ((1, 0.5), (70, 0.5), (125, 0.95), (180, 0.85), (230, 0.65), (280, 0.75), (335, 0.5)),
    'scrub': ((1, 0.12), (80, 0.14), (140, 0.28), (240, 0.2), (300, 0.14)),
    'winter': ((1, 0.32), (60, 0.42), (115, 0.97), (155, 0.9), (185, 0.12), (200, 0.02),
               (290, 0.02), (330, 0.25)),
    'summer': ((1, 0.02), (130, 0.02), (165, 0.35), (195, 0.95), (240, 0.9), (270, 0.3),
               (285, 0.03)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Surface:
    """Type of surface.

    Attributes:
        name: Name of the surface.
        land_cover: Name of the land-cover class it belongs to.
        background: Material without vegetation.
        green: Material of the vegetation.
        season: Key of the green fraction over the year.
        vv: VV backscatter in dB without vegetation.
        vh: VH backscatter in dB without vegetation.
        growth: Increase of VV and VH with full vegetation, in dB.
        moisture: Sensitivity to soil moisture, 0 to 1.
        grain: Relative standard deviation of the brightness between pixels.
        mottle: Standard deviation of the green fraction over a few hundred metres.
        roughness: Standard deviation of the backscatter in space, in dB.
    """

    name: str
    land_cover: str
    background: str
    green: str
    season: str
    vv: float
    vh: float
    growth: tuple[float, float] = (0.0, 0.0)
    moisture: float = 1.0
    grain: float = 0.03
    mottle: float = 0.05
    roughness: float = 0.5


SURFACES: tuple[Surface, ...] = (
    Surface('water', 'water', 'water', 'water', 'none', -20.0, -27.0, moisture=0.0, grain=0.01,
            mottle=0.0, roughness=0.0),
    Surface('marsh', 'wetland', 'soil', 'herbs', 'grass', -8.5, -17.0, growth=(2.0, 2.0),
            moisture=0.3, grain=0.04, mottle=0.1, roughness=1.2),
    Surface('swamp forest', 'wetland', 'twigs', 'broadleaf', 'deciduous', -5.5, -13.5,
            growth=(0.0, 0.5), moisture=0.1, grain=0.13, roughness=1.0),
    Surface('broad-leaved forest', 'forest', 'twigs', 'broadleaf', 'deciduous', -9.5, -15.0,
            growth=(0.5, 0.5), moisture=0.1, grain=0.13, roughness=0.7),
    Surface('conifers', 'forest', 'soil', 'conifer', 'evergreen', -9.5, -15.5, moisture=0.1,
            grain=0.16, mottle=0.02, roughness=0.7),
    Surface('pasture', 'grassland', 'straw', 'herbs', 'grass', -12.5, -20.0, growth=(0.5, 1.0),
            mottle=0.14),
    Surface('meadow', 'grassland', 'soil', 'herbs', 'grass', -12.0, -19.5, growth=(0.5, 1.0),
            mottle=0.1),
    Surface('wheat', 'winter crops', 'straw', 'herbs', 'winter', -10.5, -18.5, growth=(-3.0, -1.5)),
    Surface('rapeseed', 'winter crops', 'soil', 'herbs', 'winter', -11.0, -19.0, growth=(0.5, 4.0)),
    Surface('maize', 'summer crops', 'soil', 'herbs', 'summer', -11.0, -19.5, growth=(1.0, 3.5)),
    Surface('sugar beet', 'summer crops', 'soil', 'herbs', 'summer', -11.0, -19.5,
            growth=(2.0, 4.5)),
    Surface('street', 'town', 'asphalt', 'herbs', 'none', -11.0, -19.0, moisture=0.2, grain=0.06),
    Surface('roofs', 'town', 'roofs', 'herbs', 'none', -4.0, -11.5, moisture=0.0, grain=0.14,
            roughness=3.5),
    Surface('gardens', 'town', 'twigs', 'herbs', 'grass', -8.5, -14.5, moisture=0.3, grain=0.12,
            roughness=1.5),
    Surface('rock', 'bare ground', 'rock', 'herbs', 'scrub', -13.0, -21.5, moisture=0.4, grain=0.08,
            mottle=0.08, roughness=1.3),
    Surface('sand', 'bare ground', 'sand', 'herbs', 'none', -18.5, -26.0, moisture=0.8, grain=0.03,
            roughness=0.8),
)  # fmt: skip

#: First and last day of the year on which rapeseed flowers, which turns it yellow.
FLOWERING = (110, 140)


def surface_index(name: str) -> int:
    """Return the index of a surface in `SURFACES`.

    Args:
        name: Name of the surface.

    Returns:
        Its index.
    """
    return [surface.name for surface in SURFACES].index(name)


def surface_classes() -> npt.NDArray[np.uint8]:
    """Return the land-cover class of every surface.

    Returns:
        Class values, one per entry of `SURFACES`.
    """
    return np.array([class_value(surface.land_cover) for surface in SURFACES], np.uint8)


def surface_values(attribute: str) -> Floats:
    """Return a numeric attribute of every surface.

    Args:
        attribute: Name of a numeric attribute of `Surface`.

    Returns:
        Array with one entry per entry of `SURFACES`; attributes that are pairs add a second axis.
    """
    return np.array([getattr(surface, attribute) for surface in SURFACES], np.float32)


def spectra(day: float) -> tuple[Floats, Floats]:
    """Return the spectra of every surface without and with vegetation.

    Args:
        day: Day of the year, 1 to 366.

    Returns:
        Spectra without and with full vegetation, each of shape (surfaces, 13), in DN.
    """
    greens = [surface.green for surface in SURFACES]
    if FLOWERING[0] <= day <= FLOWERING[1]:
        greens[surface_index('rapeseed')] = 'flowers'
    bare = [_MATERIALS[surface.background] for surface in SURFACES]
    green = [_MATERIALS[name] for name in greens]
    return np.array(bare, np.float32), np.array(green, np.float32)


def green_fraction(surface: npt.NDArray[np.integer], day: npt.NDArray[np.floating]) -> Floats:
    """Return the fraction of the ground that is covered by vegetation.

    Args:
        surface: Indices into `SURFACES`.
        day: Day of the year for each of them. Days beyond a year wrap around.

    Returns:
        Fractions, 0 to 1, of the same shape.
    """
    fraction = np.zeros(surface.shape, np.float32)
    for i, kind in enumerate(SURFACES):
        days, greens = zip(*_SEASONS[kind.season], strict=True)
        here = surface == i
        fraction[here] = np.interp(day[here], days, greens, period=365.25)
    return fraction
