"""Pair the files of two sensors by their names."""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from geofm.datasets.catalogue.scenes import SENSOR_NUMBERS, Rows, Scenes
from geofm.datasets.pairs.skipped import Reason, Skipped

#: Pair by the time step of the data set, or pair each S2 with the S1 of the same patch nearest in
#: time.
Pairing = Literal['time_step', 'nearest']

#: SEN12MS-CR is paired by 'patch': each S2 with the only S1 of its patch.
type AnyPairing = Pairing | Literal['patch']


def pair_scenes(
    scenes: Scenes, rows: Rows, sensors: Sequence[str], pairing: AnyPairing, skipped: Skipped
) -> dict[str, Rows]:
    """Find the pairs among files.

    Args:
        scenes: The files.
        rows: Indices of the files to consider, including those with problems. The partner of a file
            with problems is left out, but not reported as a file without a partner.
        sensors: The required sensors, in the order of :data:`SENSOR_NUMBERS`. The last one is the
            reference. If there is only one, each of its files is a sample.
        pairing: 'time_step' pairs S1 and S2 of the same time step. 'nearest' pairs each S2 file
            with the S1 file of the same patch whose date is nearest, and with the earlier one if
            two are equally near; an S1 may be paired with several S2. 'patch' pairs each S2 with
            the only S1 of its patch.
        skipped: Receives files without a partner, and files that have sensor, place and time step
            in common.

    Returns:
        Indices of the files of each pair, by sensor, sorted by season, ROI, patch and time step (of
        S2).
    """
    rows = rows[np.isin(scenes.sensor[rows], [SENSOR_NUMBERS[sensor] for sensor in sensors])]
    # Sort by key, then by sensor.
    numbers = scenes.keys(rows) * 2 + scenes.sensor[rows]
    order = np.argsort(numbers, kind='stable')
    rows, numbers = rows[order], numbers[order]
    good = scenes.problem[rows] < 0
    good[good] = ~_double(scenes, rows[good], numbers[good], skipped)
    if len(sensors) == 1:
        return {sensors[0]: rows[good]}
    links = numbers // 2 if pairing == 'time_step' else scenes.places(rows)
    other, reference = sensors
    is_s1 = scenes.sensor[rows] == SENSOR_NUMBERS[other]
    s1, s2 = np.flatnonzero(good & is_s1), np.flatnonzero(good & ~is_s1)
    if pairing == 'nearest':
        partner = _nearest(links, scenes.day[rows], s1, s2)
    else:
        partner = _equal(links, s1, s2)
        lone = s1[~np.isin(links[s1], links[s2])]
        _report(scenes, rows, links, lone, ~is_s1 & ~good, Reason.ONLY_S1, skipped)
    _report(scenes, rows, links, s2[partner < 0], is_s1 & ~good, Reason.ONLY_S2, skipped)
    paired = partner >= 0
    return {other: rows[partner[paired]], reference: rows[s2[paired]]}


def _double(
    scenes: Scenes, rows: Rows, numbers: npt.NDArray[np.int64], skipped: Skipped
) -> npt.NDArray[np.bool_]:
    """Return which files must be left out because others have the same number. Input is sorted."""
    gone = np.zeros(len(rows), bool)
    # Find runs of equal numbers.
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = np.append(starts[1:], len(rows))
    for start, end in zip(*(edge[ends - starts > 1] for edge in (starts, ends)), strict=True):
        paths = scenes.paths.take(rows[start:end])
        real = [os.path.realpath(path) for path in paths]
        gone[start:end] = True
        if len(set(real)) == 1:
            # All paths lead to the same file.
            gone[start] = False
        else:
            skipped.add(Reason.AMBIGUOUS, *paths)
    return gone


def _equal(links: npt.NDArray[np.int64], s1: Rows, s2: Rows) -> Rows:
    """Return for each S2 the S1 with the same link, or -1 if there is none."""
    # Links are sorted, as they are keys or places, and places are the first part of the key.
    where = np.searchsorted(links[s1], links[s2])
    there = where < len(s1)
    there[there] = links[s1[where[there]]] == links[s2[there]]
    partner = np.full(len(s2), -1, np.intp)
    partner[there] = s1[where[there]]
    return partner


def _nearest(
    places: npt.NDArray[np.int64], days: npt.NDArray[np.int32], s1: Rows, s2: Rows
) -> Rows:
    """Return for each S2 the S1 of its place that is nearest in time, or -1 if there is none."""
    # Combine place and day to one number, so that one search suffices.
    numbers = np.unique(places, return_inverse=True)[1].astype(np.int64)
    when = days.astype(np.int64) - int(days.min(initial=0))
    times = numbers * (int(when.max(initial=0)) + 1) + when
    s1 = s1[np.argsort(times[s1], kind='stable')]
    before = np.searchsorted(times[s1], times[s2], 'right') - 1
    partner = np.full(len(s2), -1, np.intp)
    gap = np.full(len(s2), np.iinfo(np.int64).max)
    for side in (before, before + 1):
        there = np.flatnonzero((side >= 0) & (side < len(s1)))
        candidate = s1[side[there]]
        there = there[numbers[candidate] == numbers[s2[there]]]
        candidate = s1[side[there]]
        apart = np.abs(times[candidate] - times[s2[there]])
        nearer = apart < gap[there]
        partner[there[nearer]], gap[there[nearer]] = candidate[nearer], apart[nearer]
    return partner


def _report(
    scenes: Scenes,
    rows: Rows,
    links: npt.NDArray[np.int64],
    lone: Rows,
    bad: npt.NDArray[np.bool_],
    reason: Reason,
    skipped: Skipped,
) -> None:
    """Record files without a partner, unless their partner is a file with problems."""
    lone = lone[~np.isin(links[lone], links[bad])]
    if len(lone):
        skipped.add(reason, *scenes.paths.take(rows[lone]))
