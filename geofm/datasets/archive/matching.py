"""Match windows of the reference sensor with observations of other sensors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from geofm.datasets.archive.windowing import Windows, shifted
from geofm.datasets.catalogue.scenes import Grids
from geofm.datasets.footprints import SEARCH_CRS, corners, shapes_on_ground
from geofm.datasets.pairs.table import overlaps
from geofm.datasets.table import RasterTable
from geofm.datasets.table.columns import NO_TIME

type Ints = npt.NDArray[np.integer[Any]]

#: Microseconds in a day, and in a second.
DAY = 86_400_000_000
_SECOND = 1_000_000

#: Gap of an observation whose date is irrelevant or unknown. It ranks after all known gaps.
_ANY = np.iinfo(np.int64).max - 1

#: Number of scenes and windows that are processed at once.
_AT_ONCE = 1 << 16

#: Difference below which coverages are considered equal.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Frames:
    """Locations and times of observations.

    Attributes:
        place: Number of the place, -1 if there is none, (K,).
        time: Microseconds since 1970-01-01, :data:`NO_TIME` where unknown, int64 (K,).
        row: Row of the table on whose grid an observation is read, (K,).
        table: Table that :attr:`row` refers to. A copy of the grids would take most of the memory
            of matching.
    """

    place: Ints
    time: npt.NDArray[np.int64]
    row: Ints
    table: RasterTable

    @property
    def epsg(self) -> Ints:
        """EPSG codes, -1 where there is no CRS, (K,)."""
        return self.table.epsg[self.row]

    @property
    def transform(self) -> npt.NDArray[np.float64]:
        """Affine coefficients a to f, float64 (K, 6)."""
        return self.table.transform[self.row]

    @property
    def shape(self) -> Ints:
        """Height and width, (K, 2)."""
        return np.stack((self.table.height[self.row], self.table.width[self.row]), axis=1)

    def take(self, numbers: Ints) -> 'Frames':
        """Select observations.

        Args:
            numbers: Indices of the observations.

        Returns:
            The selected observations.
        """
        return Frames(self.place[numbers], self.time[numbers], self.row[numbers], self.table)


class Rule(NamedTuple):
    """Rule by which observations are matched.

    Attributes:
        ignores_date: Whether any date matches, as for an elevation model.
        max_day_gap: Maximum number of days between the two; None for any number.
        min_overlap: Smallest fraction of the window, 0 to 1, that must be covered.
    """

    ignores_date: bool
    max_day_gap: int | None
    min_overlap: float


def match_windows(
    scenes: Frames, windows: Windows, others: Frames, rule: Rule
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Find the best observation of another sensor for each window.

    Observations of the same place are matched first: the one with the nearest date is chosen, see
    :func:`nearest_at_place`, and a window that it does not cover enough has no match. Otherwise,
    candidates are the observations without a place (or all, if the scene has none) that cover
    enough of the window. Of these, the one with the nearest date is chosen; if several are equally
    near, the one that covers most of the window, and if they cover the same, the first.

    Args:
        scenes: Observations of the reference sensor.
        windows: Windows of *scenes*.
        others: Observations of the other sensor.
        rule: Rule by which they are matched.

    Returns:
        Index of the observation for each window, -1 where there is none; and the fraction of the
        window that the observation covers.
    """
    chosen = nearest_at_place(scenes, others, rule)[windows.scene]
    covered = np.zeros(len(chosen), np.float32)
    found = np.flatnonzero(chosen >= 0).astype(np.int32)
    for part in _parts(found):
        covered[part] = coverage(scenes, windows.take(part), others.take(chosen[part]))
    by_place = np.zeros(len(scenes.place), bool)
    by_place[windows.scene[found]] = True
    del found
    too_little = (covered < rule.min_overlap - _TOLERANCE) | (covered == 0)
    chosen[too_little & (chosen >= 0)] = -1
    lone = np.flatnonzero(~by_place & (scenes.epsg > 0))
    if len(lone):
        # Two observations with different places do not match.
        free = np.flatnonzero((others.epsg > 0) & np.isfinite(others.transform).all(axis=1))
        scene, other = _overlapping(scenes, others, lone, free)
        same = (scenes.place[scene] < 0) | (others.place[other] < 0)
        _match_by_ground(
            scenes, windows, others, rule, (scene[same], other[same]), (chosen, covered)
        )
    covered[chosen < 0] = 0
    return chosen, covered


def nearest_at_place(scenes: Frames, others: Frames, rule: Rule) -> npt.NDArray[np.int32]:
    """Find the observation of the same place whose date is nearest.

    Args:
        scenes: Observations of the reference sensor.
        others: Observations of the other sensor.
        rule: Rule by which they are matched.

    Returns:
        Index of the observation for each scene, -1 where there is none. If two observations are
        equally near, the earlier one is chosen. If no observation with a date is near enough, an
        observation without a date is chosen.
    """
    chosen = np.full(len(scenes.place), -1, np.int32)
    known = np.flatnonzero(others.place >= 0).astype(np.int32)
    wanted = np.flatnonzero(scenes.place >= 0).astype(np.int32)
    if not len(known) or not len(wanted):
        return chosen
    first, last = _first_and_last(scenes.time, others.time)
    # Combine place and time to one number, so that one search suffices.
    span = (last - first) // _SECOND + 2
    keys = np.empty(len(known), np.int64)
    for start in range(0, len(known), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        seconds = _seconds(others.time[known[part]], first)
        keys[part] = others.place[known[part]].astype(np.int64) * span + seconds
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind='stable')
        known, keys = known[order], keys[order]
    index = _PlaceIndex(others, known, keys, first, span)
    for scene in _parts(wanted):
        index.match(scenes, scene, rule, chosen)
    return chosen


class _PlaceIndex(NamedTuple):
    """Observations sorted by place and time.

    Attributes:
        others: All observations.
        known: Indices of the observations with a place, sorted.
        keys: Place and second of each of them combined to one number, ascending.
        start: Earliest time, in microseconds since 1970-01-01.
        span: Larger than the latest second. The first key of a place is the place times *span*.
    """

    others: Frames
    known: Ints
    keys: npt.NDArray[np.int64]
    start: int
    span: int

    def match(
        self, scenes: Frames, wanted: Ints, rule: Rule, chosen: npt.NDArray[np.int32]
    ) -> None:
        """Find the nearest observations of some scenes.

        Args:
            scenes: Observations of the reference sensor.
            wanted: Indices of the scenes to match.
            rule: Rule by which they are matched.
            chosen: Index of the observation of each scene; written in place.
        """
        others, known, keys, start, span = self
        places = scenes.place[wanted].astype(np.int64)
        first = np.searchsorted(keys, places * span)
        found = first < len(known)
        found[found] = others.place[known[first[found]]] == places[found]
        wanted, places, first = wanted[found], places[found], first[found]
        # Observations without a date sort first.
        undated = (others.time[known[first]] == NO_TIME) | rule.ignores_date
        free = undated | (scenes.time[wanted] == NO_TIME)
        chosen[wanted[free]] = known[first[free]]
        if rule.ignores_date:
            return
        best = np.full(len(wanted), _ANY)
        target = places * span + _seconds(scenes.time[wanted], start)
        before = np.searchsorted(keys, target, 'right') - 1
        for side in (before, before + 1):
            inside = np.flatnonzero((side >= 0) & (side < len(known)))
            candidate = known[side[inside]]
            gap = _gaps(scenes, others, wanted[inside], candidate, rule)
            nearer = (others.place[candidate] == places[inside]) & (gap < best[inside])
            chosen[wanted[inside[nearer]]] = candidate[nearer]
            best[inside[nearer]] = gap[nearer]


def _first_and_last(*times: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return earliest and latest of all known times; 0 and 0 if none is known."""
    largest = np.iinfo(np.int64).max
    earliest = [int(t.min(initial=largest, where=t != NO_TIME)) for t in times]
    # A missing time is the smallest integer.
    latest = [int(t.max(initial=NO_TIME)) for t in times]
    return (0, 0) if max(latest) == NO_TIME else (min(earliest), max(latest))


def _seconds(times: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.int64]:
    """Convert times to small numbers from 1, and missing times to 0.

    Seconds are used since microseconds combined with a place would not fit into 64 bits.
    """
    missing = times == NO_TIME
    seconds = np.where(missing, start, times)
    seconds -= start
    seconds //= _SECOND
    seconds += 1
    seconds[missing] = 0
    return seconds


def _gaps(
    scenes: Frames, others: Frames, scene: Ints, other: Ints, rule: Rule
) -> npt.NDArray[np.int64]:
    """Return time gaps: :data:`_ANY` without a date, and more if the gap is too long."""
    here, there = scenes.time[scene], others.time[other]
    undated = (here == NO_TIME) | (there == NO_TIME) | rule.ignores_date
    here, there = np.where(undated, 0, here), np.where(undated, 0, there)
    gap = np.where(undated, _ANY, np.abs(here - there))
    if rule.max_day_gap is not None:
        days = np.abs(here // DAY - there // DAY)
        gap[days > rule.max_day_gap] = _ANY + 1
    return gap


def _overlapping(
    scenes: Frames, others: Frames, lone: Ints, free: Ints
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return pairs of scenes and other observations that may overlap on the ground."""
    tree = shapely.STRtree(_shapes(others.take(free)))
    found = [np.zeros((2, 0), np.intp)]
    for part in _parts(lone):
        scene, other = tree.query(_shapes(scenes.take(part)), predicate='intersects')
        found.append(np.stack([part[scene], free[other]]))
    scene, other = np.concatenate(found, axis=1)
    return scene, other


def _shapes(frames: Frames) -> npt.NDArray[np.object_]:
    """Return footprints in longitude and latitude."""
    points = corners(frames.epsg.astype(np.int32), frames.transform, frames.shape.astype(np.int32))
    return shapes_on_ground(points, SEARCH_CRS)


def _match_by_ground(
    scenes: Frames,
    windows: Windows,
    others: Frames,
    rule: Rule,
    pairs: tuple[Ints, Ints],
    result: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]],
) -> None:
    """Match windows with observations that cover them, nearest first; modifies *result*."""
    scene, other = pairs
    gap = _gaps(scenes, others, scene, other, rule)
    near = gap <= _ANY
    scene, other, gap = scene[near], other[near], gap[near]
    order = np.lexsort((other, gap, scene))
    scene, other, gap = scene[order], other[order], gap[order]
    chosen, covered = result
    starts = np.searchsorted(scene, np.arange(len(scenes.place) + 1))
    turn, end = starts[:-1][windows.scene], starts[1:][windows.scene]
    best_gap = np.full(len(turn), -1, np.int64)
    # Each round tries the next observation for the remaining windows.
    left = np.flatnonzero(turn < end)
    while len(left):
        for part in _parts(left):
            number = turn[part]
            found = coverage(scenes, windows.take(part), others.take(other[number]))
            better = (found >= rule.min_overlap - _TOLERANCE) & (found > covered[part] + _TOLERANCE)
            rows = part[better]
            chosen[rows], covered[rows] = other[number[better]], found[better]
            best_gap[rows] = gap[number[better]]
        turn[left] += 1
        left = left[turn[left] < end[left]]
        done = covered[left] >= 1 - _TOLERANCE
        done |= (best_gap[left] >= 0) & (gap[turn[left]] > best_gap[left])
        left = left[~done]


def coverage(scenes: Frames, windows: Windows, others: Frames) -> npt.NDArray[np.float32]:
    """Compute the fraction of each window that an observation covers.

    Args:
        scenes: Observations of the reference sensor.
        windows: The windows.
        others: One observation per window.

    Returns:
        Fractions from 0 to 1. They are 1 unless both are georeferenced.
    """
    covered = np.ones(len(windows.scene), np.float32)
    frames = scenes.take(windows.scene)
    epsg, own, other_epsg, other = frames.epsg, frames.transform, others.epsg, others.transform
    # In most cases both have the same grid, so that the window is covered.
    same = (epsg == other_epsg) & (own == other).all(axis=1)
    same &= (frames.shape == others.shape).all(axis=1)
    if same.all():
        return covered
    transform = shifted(own, windows.row, windows.col)
    placed = ~same & (epsg > 0) & (other_epsg > 0)
    # On upright grids in the same CRS, comparing boxes suffices.
    upright = placed & (epsg == other_epsg)
    for t in (transform, other):
        upright &= (t[:, 1] == 0) & (t[:, 3] == 0)
    rows = np.flatnonzero(upright)
    sizes = np.stack((windows.height, windows.width), axis=1)
    near = np.ones(len(rows), bool)
    if len(rows):
        ours = _boxes(transform[rows], sizes[rows])
        theirs = _boxes(other[rows], others.shape[rows])
        low, high = np.maximum(ours[0], theirs[0]), np.minimum(ours[1], theirs[1])
        shared = np.maximum(high - low, 0).prod(axis=1)
        share = shared / (ours[1] - ours[0]).prod(axis=1)
        # Ignore rounding of coordinates.
        covered[rows] = np.where(share > 1 - 1e-6, 1, share)
        # Longitudes of two grids may differ by 360 degrees, so check again without overlap.
        near = share > 0
    rest = placed.copy()
    rest[rows[near]] = False
    rows = np.flatnonzero(rest)
    if len(rows):
        grids = np.zeros(len(rows), _GRID)
        grids['transform'], grids['epsg'] = transform[rows], epsg[rows]
        grids['height'], grids['width'] = sizes[rows].T
        files = others.take(rows)
        shape = files.shape.astype(np.int32)
        covered[rows] = overlaps(
            Grids(0, files.epsg.astype(np.int32), files.transform, shape), grids
        )
    covered[(epsg > 0) != (other_epsg > 0)] = 1
    return covered


#: Fields of a window that :func:`overlaps` needs.
_GRID = np.dtype(
    [('transform', np.float64, 6), ('epsg', np.int32), ('height', np.int32), ('width', np.int32)]
)


def _boxes(
    transform: npt.NDArray[np.float64], shape: Ints
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return lowest and highest x and y of upright grids, shape (N, 2) each."""
    one = transform[:, [2, 5]]
    other = one + transform[:, [0, 4]] * shape[:, ::-1]
    return np.minimum(one, other), np.maximum(one, other)


def _parts(rows: Ints) -> list[npt.NDArray[np.integer[Any]]]:
    """Split indices into parts that are small enough to be processed at once."""
    return [rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)]
