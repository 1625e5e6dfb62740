"""Patches and dates of a region of interest."""

import math
from dataclasses import dataclass

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.sen12ms import PIXEL_SIZE, Roi, region_of

#: Default ROIs: eight of the official train split, three of val and three of test.
DEFAULT_ROIS: tuple[Roi, ...] = (
    ('ROIs1868', 36),
    ('ROIs1868', 121),
    ('ROIs1868', 139),
    ('ROIs1970', 57),
    ('ROIs1970', 71),
    ('ROIs1970', 142),
    ('ROIs2017', 25),
    ('ROIs2017', 146),
    ('ROIs1868', 17),
    ('ROIs1868', 127),
    ('ROIs1970', 65),
    ('ROIs1868', 119),
    ('ROIs1970', 132),
    ('ROIs2017', 108),
)

#: Number of patches per row, and of rows, of a ROI of SEN12MS-CR-TS.
PATCHES_PER_ROW = 20

# West, south, east and north of an area of land in each world region, all on the northern
# hemisphere, for which the seasons of the surfaces are defined.
_LAND = {
    'africa': (0.0, 34.0, 8.0, 36.0),
    'america': (-100.0, 38.0, -88.0, 44.0),
    'asiaEast': (112.0, 34.0, 118.0, 40.0),
    'asiaWest': (62.0, 38.0, 72.0, 42.0),
    'europa': (5.0, 47.0, 20.0, 51.0),
}
# Fractions of overcast and of partly cloudy dates.
_OVERCAST, _PARTLY = 0.1, 0.35


@dataclass(frozen=True)
class Patch:
    """Location of a patch.

    Attributes:
        number: Number of the patch in the region.
        rows: Rows of the patch in the landscape.
        cols: Columns of the patch in the landscape.
        grid: Georeferenced grid of the patch.
    """

    number: int
    rows: slice
    cols: slice
    grid: Grid


@dataclass(frozen=True)
class Date:
    """Dates of one time step.

    Attributes:
        s1: Day of the year of Sentinel-1 in 2018, 1 to 365.
        s2: Day of the year of Sentinel-2 in 2018, 1 to 365.
        cover: Cloud-covered fraction of the Sentinel-2 image, 0 to 1.
    """

    s1: int
    s2: int
    cover: float


def randomness(seed: int, roi: Roi, *purpose: int) -> np.random.Generator:
    """Return a separate random generator for each use, so that uses are independent.

    Args:
        seed: Seed of the data set.
        roi: Region of interest.
        *purpose: Numbers that identify the use.

    Returns:
        The generator.
    """
    return np.random.default_rng([seed, int(roi[0].removeprefix('ROIs')), roi[1], *purpose])


def patches_of(roi: Roi, count: int, size: int) -> list[Patch]:
    """Return adjacent patches of a region that form an approximately square block.

    Args:
        roi: Region of interest.
        count: Number of patches.
        size: Height and width of a patch in pixels.

    Returns:
        The patches, row by row from the upper left.
    """
    west, south, east, north = _LAND[str(region_of(*roi))]
    rng = randomness(0, roi, 5)  # the location does not depend on the seed
    left = round(rng.uniform(west, east) / PIXEL_SIZE) * PIXEL_SIZE
    top = round(rng.uniform(south, north) / PIXEL_SIZE) * PIXEL_SIZE
    transform = Affine(PIXEL_SIZE, 0, left, 0, -PIXEL_SIZE, top)
    columns = math.ceil(math.sqrt(count))
    patches = []
    for row, col in (divmod(i, columns) for i in range(count)):
        y, x = row * size, col * size
        grid = Grid(CRS.from_epsg(4326), transform @ Affine.translation(x, y), size, size)
        number = row * PATCHES_PER_ROW + col
        patches.append(Patch(number, slice(y, y + size), slice(x, x + size), grid))
    return patches


def dates_of(rng: np.random.Generator, time_steps: int) -> list[Date]:
    """Draw dates over the year, with Sentinel-1 one to five days before or after Sentinel-2.

    Args:
        rng: Source of randomness.
        time_steps: Number of dates, at most 30.

    Returns:
        The dates, sorted by the date of Sentinel-2.
    """
    spacing = 365 / time_steps
    days = (np.arange(time_steps) + 0.5 + rng.uniform(-0.25, 0.25, time_steps)) * spacing
    gaps = np.concatenate([rng.permutation([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]) for _ in range(3)])
    # Stratified, so that no region with few dates is cloudy on all of them.
    luck = (rng.permutation(time_steps) + rng.random(time_steps)) / time_steps
    dates = []
    for day, gap, draw in zip(days, gaps, luck, strict=False):
        if draw < _OVERCAST:
            cover = rng.uniform(0.85, 1.0)
        elif draw < _OVERCAST + _PARTLY:
            cover = rng.uniform(0.1, 0.6)
        else:
            cover = 0.0
        s2 = round(np.clip(day, 6, 360))
        dates.append(Date(s1=int(s2 + gap), s2=s2, cover=cover))
    return dates
