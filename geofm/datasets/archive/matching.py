"""Which observation of another sensor goes with each window of the reference sensor."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import shapely

from geofm.datasets.archive.windowing import Windows, shifted
from geofm.datasets.catalogue.scenes import Grids
from geofm.datasets.footprints import SEARCH_CRS, corners, shapes_on_ground
from geofm.datasets.pairs.table import overlaps
from geofm.datasets.table.columns import NO_TIME

type Ints = npt.NDArray[np.integer[Any]]

#: Microseconds in a day, and in a second.
DAY = 86_400_000_000
_SECOND = 1_000_000

#: Gap of an observation whose date does not matter, or is not known: after all with a date.
_ANY = np.iinfo(np.int64).max - 1

#: Scenes and windows that are looked at together.
_AT_ONCE = 1 << 16

#: Coverages that differ by less are equal.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Frames:
    """Where and when observations were taken.

    Attributes:
        place: Number of the place, -1 if none is given, (K,).
        time: Microseconds since 1970-01-01, :data:`NO_TIME` where unknown, int64 (K,).
        row: Row of the table whose grid an observation is read on, (K,).
        table: What :attr:`row` numbers. A copy of the grids of all observations would take most
            of the memory of a match.
    """

    place: Ints
    time: npt.NDArray[np.int64]
    row: Ints
    table: 'GridTable'

    @property
    def epsg(self) -> Ints:
        """EPSG codes, -1 where there is none, (K,)."""
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
        """Choose observations.

        Args:
            numbers: Their numbers.

        Returns:
            Those observations.
        """
        return Frames(self.place[numbers], self.time[numbers], self.row[numbers], self.table)


class GridTable(Protocol):
    """A table of grids, such as :class:`~geofm.datasets.table.RasterTable`, a row per raster."""

    @property
    def epsg(self) -> Ints:
        """EPSG codes, -1 where there is none, (N,)."""

    @property
    def transform(self) -> npt.NDArray[np.float64]:
        """Affine coefficients a to f, float64 (N, 6)."""

    @property
    def height(self) -> Ints:
        """Numbers of rows of pixels, (N,)."""

    @property
    def width(self) -> Ints:
        """Numbers of columns of pixels, (N,)."""


class Rule(NamedTuple):
    """How observations are matched.

    Attributes:
        ignores_date: Whether any date matches, as for an elevation model.
        max_day_gap: Most days between the two; None for any number.
        min_overlap: Least fraction, 0 to 1, of the window that must be covered.
    """

    ignores_date: bool
    max_day_gap: int | None
    min_overlap: float


def match_windows(
    scenes: Frames, windows: Windows, others: Frames, rule: Rule
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Find the best observation of another sensor for each window.

    That is the one of the same place, or without a place one that covers enough of the window,
    whose date is nearest. Of several of the same gap in time it is the one that covers most; of
    several still, the first.

    Args:
        scenes: Observations of the reference sensor.
        windows: Windows of them.
        others: Observations of the other sensor.
        rule: How they are matched.

    Returns:
        Number of the observation for each window, -1 where there is none; and the fraction of the
        window that it covers.
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
        # What has a place of its own shows that place.
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
        rule: How they are matched.

    Returns:
        Number of the observation for each scene, -1 where there is none: the earlier of two as
        near; one without a date if none with a date is near enough.
    """
    chosen = np.full(len(scenes.place), -1, np.int32)
    known = np.flatnonzero(others.place >= 0).astype(np.int32)
    wanted = np.flatnonzero(scenes.place >= 0).astype(np.int32)
    if not len(known) or not len(wanted):
        return chosen
    first, last = _first_and_last(scenes.time, others.time)
    # Place and time as one number, so that one search finds both.
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
        known: Numbers of those that have a place, sorted.
        keys: Place and second of each of them as one number, ascending.
        start: Earliest time, in microseconds since 1970-01-01.
        span: More than the latest second; a place times this is the first key of the place.
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
            wanted: Numbers of those to look at.
            rule: How they are matched.
            chosen: Takes the number of the observation for each scene.
        """
        others, known, keys, start, span = self
        places = scenes.place[wanted].astype(np.int64)
        first = np.searchsorted(keys, places * span)
        found = first < len(known)
        found[found] = others.place[known[first[found]]] == places[found]
        wanted, places, first = wanted[found], places[found], first[found]
        # The first one has no date, if any has none.
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
    """Earliest and latest of all times that are known; 0 and 0 if none is."""
    largest = np.iinfo(np.int64).max
    earliest = [int(t.min(initial=largest, where=t != NO_TIME)) for t in times]
    # A missing time is the least number.
    latest = [int(t.max(initial=NO_TIME)) for t in times]
    return (0, 0) if max(latest) == NO_TIME else (min(earliest), max(latest))


def _seconds(times: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.int64]:
    """Times as small numbers from 1 on, 0 for a missing one.

    To the second: with a place in front, microseconds would not fit into 64 bits.
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
    """Time between observations; without a date :data:`_ANY`, and more if it is too long."""
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
    """Numbers of scenes and of the others that may touch them on the ground."""
    tree = shapely.STRtree(_shapes(others.take(free)))
    found = [np.zeros((2, 0), np.intp)]
    for part in _parts(lone):
        scene, other = tree.query(_shapes(scenes.take(part)), predicate='intersects')
        found.append(np.stack([part[scene], free[other]]))
    scene, other = np.concatenate(found, axis=1)
    return scene, other


def _shapes(frames: Frames) -> npt.NDArray[np.object_]:
    """Footprints in longitude and latitude."""
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
    """Match windows with what covers them, the nearest date first; changes *result*."""
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
    # Each round tries one more observation for the windows that have none yet.
    left = np.flatnonzero(turn < end)
    while len(left):
        for part in _parts(left):
            number = turn[part]
            share = coverage(scenes, windows.take(part), others.take(other[number]))
            better = (share >= rule.min_overlap - _TOLERANCE) & (share > covered[part] + _TOLERANCE)
            rows = part[better]
            chosen[rows], covered[rows] = other[number[better]], share[better]
            best_gap[rows] = gap[number[better]]
        turn[left] += 1
        left = left[turn[left] < end[left]]
        done = covered[left] >= 1 - _TOLERANCE
        done |= (best_gap[left] >= 0) & (gap[turn[left]] > best_gap[left])
        left = left[~done]


def coverage(scenes: Frames, windows: Windows, others: Frames) -> npt.NDArray[np.float32]:
    """Fraction of each window that an observation covers.

    Args:
        scenes: Observations that the windows are of.
        windows: The windows.
        others: One observation for each window.

    Returns:
        Fractions from 0 to 1; 1 where neither is georeferenced.
    """
    covered = np.ones(len(windows.scene), np.float32)
    frames = scenes.take(windows.scene)
    epsg, own, other_epsg, other = frames.epsg, frames.transform, others.epsg, others.transform
    # Most often both are on one grid, of which the window is a part.
    same = (epsg == other_epsg) & (own == other).all(axis=1)
    same &= (frames.shape == others.shape).all(axis=1)
    if same.all():
        return covered
    transform = shifted(own, windows.row, windows.col)
    placed = ~same & (epsg > 0) & (other_epsg > 0)
    # On upright grids of one CRS, boxes say it all.
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
        # Rounding of coordinates is no gap.
        covered[rows] = np.where(share > 1 - 1e-6, 1, share)
        # Longitudes of two grids may be a turn of the globe apart.
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


#: What :func:`overlaps` needs to know of a window.
_GRID = np.dtype(
    [('transform', np.float64, 6), ('epsg', np.int32), ('height', np.int32), ('width', np.int32)]
)


def _boxes(
    transform: npt.NDArray[np.float64], shape: Ints
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Lowest and highest x and y of upright grids, shape (N, 2) each."""
    one = transform[:, [2, 5]]
    other = one + transform[:, [0, 4]] * shape[:, ::-1]
    return np.minimum(one, other), np.maximum(one, other)


def _parts(rows: Ints) -> list[npt.NDArray[np.integer[Any]]]:
    """Numbers in parts that are small enough to be looked at together."""
    return [rows[i : i + _AT_ONCE] for i in range(0, len(rows), _AT_ONCE)]
