"""Observations: rows of a table with the same place, sensor and time."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from geofm.datasets.memory.shared_array import SharedFields
from geofm.datasets.table.columns import NO_TIME, shorten
from geofm.datasets.table.error import row_error
from geofm.datasets.table.raster_table import RasterTable

type Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Observations(SharedFields):
    """Rows of a table in groups, sorted by place, scene, sensor and time.

    A group is one file with all bands, or several files with one band each. Files with a problem
    are left out.

    Attributes:
        order: Indices of the rows, in which those of a group are adjacent, int32 (M,).
        first: Index into *order* of the first row of each group, int32 (K,).
        count: Number of rows of each group, int32 (K,).
        sensor: Index into the sensors of the table, int8 (K,).
        place: Index into the places of the table, int32 (K,); -1 if the row has no place.
        time: Microseconds since 1970-01-01 UTC, int64 (K,).
        left_out: Number of rows with a problem.
    """

    order: Ints
    first: Ints
    count: Ints
    sensor: Ints
    place: Ints
    time: npt.NDArray[np.int64]
    left_out: int

    @classmethod
    def of(cls, table: RasterTable) -> Self:
        """Group the rows of a table.

        Args:
            table: The table.

        Returns:
            The observations.

        Raises:
            TableError: If two rows have the same place, sensor, time and bands.
        """
        order = np.flatnonzero(table.problem < 0).astype(np.int32)
        left_out = len(table) - len(order)
        group = _scene_codes(table)[order]
        keys: list[npt.NDArray[Any]] = [
            table.sensor[order],
            table.time[order],
            table.band[order],
            table.index[order],
        ]
        if not _is_sorted([group, *keys]):
            change = np.lexsort([*reversed(keys), group])
            order, group = order[change], group[change]
            keys = [key[change] for key in keys]
        starts = np.ones(len(order), bool)
        starts[1:] = _differ(group) | _differ(keys[0]) | _differ(keys[1])
        # Each row without a scene or place is a separate observation.
        starts |= group < 0
        first = np.flatnonzero(starts).astype(np.int32)
        count = np.diff(first, append=len(order))
        _check_bands(table, order, first, count)
        return cls(
            order,
            first,
            count.astype(np.int32),
            keys[0][first],
            table.place[order[first]],
            keys[1][first],
            left_out,
        )

    def __len__(self) -> int:
        """Return the number of observations."""
        return len(self.first)

    def rows(self, number: int) -> Ints:
        """Return the rows of an observation.

        Args:
            number: Index of the observation.

        Returns:
            Indices of its rows in the table.
        """
        first = self.first[number]
        return self.order[first : first + self.count[number]]

    def main_rows(self, table: RasterTable) -> Ints:
        """Return the row on whose grid each observation is read: that of the finest band.

        Args:
            table: The table.

        Returns:
            Index of a row of the table for each observation.
        """
        rows = self.order[self.first].copy()
        if len(rows) == len(self.order):
            return rows
        pixels = table.height[self.order].astype(np.int64) * table.width[self.order]
        most = np.maximum.reduceat(pixels, self.first)
        # Choose the first row of each group with the most pixels.
        positions = np.flatnonzero(pixels == np.repeat(most, self.count))
        _, at = np.unique(np.searchsorted(self.first, positions, 'right'), return_index=True)
        return self.order[positions[at]]


def _scene_codes(table: RasterTable) -> npt.NDArray[np.int64]:
    """Number places, and scenes of rows without place; -1 where there is neither."""
    codes = table.place.astype(np.int64)
    if table.scene is None:
        return codes
    scenes = np.where(table.scene >= 0, table.scene.astype(np.int64) + len(table.places), -1)
    return np.where(codes >= 0, codes, scenes)


def _is_sorted(keys: list[Ints]) -> bool:
    """Check whether rows are sorted by several keys."""
    if len(keys[0]) < 2:
        return True
    equal = np.ones(len(keys[0]) - 1, bool)
    for key in keys:
        if (equal & (key[1:] < key[:-1])).any():
            return False
        equal &= key[1:] == key[:-1]
    return True


def _differ(key: Ints) -> npt.NDArray[np.bool_]:
    """Return where a value differs from the preceding one."""
    return np.asarray(key[1:] != key[:-1])


def _check_bands(table: RasterTable, order: Ints, first: Ints, count: Ints) -> None:
    """Raise an error if an observation has a band twice."""
    several = count > 1
    if not several.any():
        return
    band = table.band[order]
    # Rows are sorted by band, so that equal ones are adjacent.
    same = np.zeros(len(order), bool)
    same[1:] = (band[1:] == band[:-1]) & (band[1:] >= 0)
    same[first] = False
    many = np.array([*(len(names) > 1 for names in table.band_lists), True])
    doubtful = np.logical_or.reduceat(same | many[band], first) & several
    # Most observations have the same bands, so check each combination once.
    seen: dict[bytes, bool] = {}
    for number in np.flatnonzero(doubtful).tolist():
        rows = order[first[number] : first[number] + count[number]]
        key = table.band[rows].tobytes()
        if key not in seen:
            seen[key] = _clash(table, rows.tolist()) is None
        if not seen[key] and (clash := _clash(table, sorted(rows.tolist()))) is not None:
            raise _duplicate(table, *clash)


def _clash(table: RasterTable, rows: list[int]) -> tuple[int, int, str | None] | None:
    """Find two rows with the same band, and the band (None means all bands of a file)."""
    owner: dict[str, int] = {}
    for i, row in enumerate(rows):
        names = table.bands_of(row)
        if names is None and len(rows) > 1:
            return rows[0], rows[max(i, 1)], None
        for name in names or ():
            if name in owner:
                return owner[name], row, name
            if name != '-':
                owner[name] = row
    return None


def _duplicate(table: RasterTable, one: int, other: int, band: str | None) -> Exception:
    """Make an error about two rows with the same band."""
    when = int(table.time[other])
    date = 'none' if when == NO_TIME else str(np.datetime64(when, 'us').astype('datetime64[s]'))
    place = int(table.place[other])
    where = 'no place' if place < 0 else f'place {shorten(table.places[place])}'
    what = table.sensor_of(other).name if band is None else f'band {band}'
    return row_error(
        table.source,
        other,
        f'{what} of {where} and datetime {date} is also in row {one + 1} ({table.path(one)} and '
        f'{table.path(other)}): remove one of them, '
        f'or distinguish them by {"scene or place" if place < 0 else "place"} or datetime',
    )
