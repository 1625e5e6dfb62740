"""Blocks of equal size on the Earth's surface, and the blocks that boxes intersect."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.lonlat import CIRCLE

#: Length of a meridian from pole to pole in kilometres, on a sphere with the Earth's mean radius.
_MERIDIAN_KM = math.pi * 6371.0088

#: Smallest side of a block: a metre. Memory is needed for each row of blocks.
_LEAST_KM = 0.001

#: Maximum number of blocks that a box may intersect.
_MOST_BLOCKS = 10_000

type Doubles = npt.NDArray[np.float64]


class Blocks:
    """Blocks that cover the globe without overlap.

    Bands of latitude with equal height are divided into columns so that the blocks are
    approximately square at that latitude. Hence all blocks have about the same area.

    Attributes:
        side_km: Side of a block in kilometres, rounded so that a whole number fits from pole to
            pole.
    """

    def __init__(self, side_km: float) -> None:
        """Initialize a new Blocks instance.

        Args:
            side_km: Side of a block in kilometres.

        Raises:
            ValueError: If *side_km* is not a positive number, or smaller than a metre.
        """
        if not side_km > 0 or not math.isfinite(side_km):
            raise ValueError(f'block_km must be a positive number of kilometres, not {side_km}')
        if side_km < _LEAST_KM:
            raise ValueError(f'block_km must be at least {_LEAST_KM:g} km, not {side_km:g} km')
        bands = max(round(_MERIDIAN_KM / side_km), 1)
        self.side_km = _MERIDIAN_KM / bands
        self._height = 180 / bands
        middle = np.radians(-90 + self._height * (np.arange(bands) + 0.5))
        self._columns = np.maximum(np.round(2 * bands * np.cos(middle)), 1).astype(np.int64)

    def touched(self, boxes: Doubles) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the blocks that boxes intersect.

        Args:
            boxes: West, south, east and north in degrees, shape (N, 4); east may exceed 180.

        Returns:
            Codes of blocks, and the index of the first code of each box. Each box has at least one.

        Raises:
            ValueError: If a box intersects thousands of blocks.
        """
        west, south, east, north = boxes.T
        bands = len(self._columns)
        low, high = (
            np.clip(np.floor((lat + 90) / self._height).astype(np.int64), 0, bands - 1)
            for lat in (south, north)
        )
        box, band = _ranges(low, high - low + 1)
        columns = self._columns[band]
        first, last = (
            np.floor((lon[box] + CIRCLE / 2) / CIRCLE * columns).astype(np.int64)
            for lon in (west, east)
        )
        per_band = np.minimum(last - first + 1, columns)
        if len(box) and np.bincount(box, per_band).max() > _MOST_BLOCKS:
            raise ValueError(
                f'blocks of {self.side_km:.3g} km are far smaller than the samples: set '
                'window_size, or larger blocks (block_km)'
            )
        pair, column = _ranges(first, per_band)
        codes = band[pair] << 32 | column % columns[pair]
        return codes, np.searchsorted(box[pair], np.arange(len(boxes)))


def widened(boxes: Doubles) -> Doubles:
    """Widen boxes around corners so that they also contain the curved edges.

    Args:
        boxes: West, south, east and north in degrees of the corners of grids, shape (N, 4).

    Returns:
        Wider boxes.
    """
    west, south, east, north = boxes.T
    highest = np.minimum(np.maximum(np.abs(south), np.abs(north)), 89.9)
    side = np.maximum((east - west) * np.cos(np.radians(highest)), north - south)
    # A straight line of length L deviates from a parallel by up to L^2 tan(latitude) / 8, in
    # radians.
    bow = np.radians(side) ** 2 * (1 + np.tan(np.radians(highest))) / 8
    margin = np.degrees(bow) + 1e-9
    wide = margin / np.cos(np.radians(highest))
    return np.stack((west - wide, south - margin, east + wide, north + margin), axis=1)


def _ranges(
    first: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the owner and the members of consecutive integer ranges."""
    owner = np.repeat(np.arange(len(first)), count)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return owner, first[owner] + offset
