"""Which file of one sensor goes with which file of the other, by what their names say."""

import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from geofm.datasets.catalogue.scenes import SENSOR_NUMBERS, Rows, Scenes
from geofm.datasets.pairs.skipped import Reason, Skipped

#: By the time step of the data set, or each S2 with the S1 of the same patch nearest in time.
Pairing = Literal['time_step', 'nearest']

#: How SEN12MS-CR is paired: each S2 with the S1 of its patch, of which there is one.
type AnyPairing = Pairing | Literal['patch']


def pair_scenes(
    scenes: Scenes, rows: Rows, sensors: Sequence[str], pairing: AnyPairing, skipped: Skipped
) -> dict[str, Rows]:
    """Find the pairs among files.

    Args:
        scenes: The files.
        rows: Numbers of those that are considered, bad ones included: what would be the partner
            of a bad file is left out, but is no file without a partner.
        sensors: The sensors that a sample needs, in the order of :data:`SENSOR_NUMBERS`; the last
            one is the reference. With one of them, each of its files is a sample of its own.
        pairing: 'time_step'; 'nearest': each S2 with the S1 of the same patch whose day is
            nearest, the earlier of two, and an S1 may go with several S2; 'patch': each S2 with
            the one S1 of its patch.
        skipped: Takes the sound files that have no partner, and those that share all of sensor,
            place and time step.

    Returns:
        Numbers of the files of each pair, by sensor. Sorted by season, ROI, patch and time step
        (of S2, if needed).
    """
    rows = rows[np.isin(scenes.sensor[rows], [SENSOR_NUMBERS[sensor] for sensor in sensors])]
    # By key, then by sensor.
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
    """Whether files must go because others have the same number, by which they are sorted."""
    gone = np.zeros(len(rows), bool)
    # Runs of equal numbers.
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = np.append(starts[1:], len(rows))
    for start, end in zip(*(edge[ends - starts > 1] for edge in (starts, ends)), strict=True):
        paths = scenes.paths.take(rows[start:end])
        real = [os.path.realpath(path) for path in paths]
        gone[start:end] = True
        if len(set(real)) == 1:
            # One file reached by several paths.
            gone[start] = False
        else:
            skipped.add(Reason.AMBIGUOUS, *paths)
    return gone


def _equal(links: npt.NDArray[np.int64], s1: Rows, s2: Rows) -> Rows:
    """For each S2 the S1 with the same link, -1 if there is none."""
    # Sorted already, as keys are; places too, which are the first part of the key.
    where = np.searchsorted(links[s1], links[s2])
    there = where < len(s1)
    there[there] = links[s1[where[there]]] == links[s2[there]]
    partner = np.full(len(s2), -1, np.intp)
    partner[there] = s1[where[there]]
    return partner


def _nearest(
    places: npt.NDArray[np.int64], days: npt.NDArray[np.int32], s1: Rows, s2: Rows
) -> Rows:
    """For each S2 the S1 of its place that is nearest in time, -1 if there is none."""
    # Places and days as one number, so that one search finds both.
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
    """Note files that have no partner, unless theirs is a bad file."""
    lone = lone[~np.isin(links[lone], links[bad])]
    if len(lone):
        skipped.add(reason, *scenes.paths.take(rows[lone]))
