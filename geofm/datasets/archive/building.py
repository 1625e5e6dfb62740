"""Build samples from a table of rasters: windows of the reference sensor and their matches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.datasets.archive.archive_table import Archive, ArchiveTable
from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.archive.matching import Frames, Rule, match_windows
from geofm.datasets.archive.windowing import Edge, Windows, window_grid
from geofm.datasets.table import RasterTable, TableError
from geofm.sensors import SENSORS, sensor_channels

type Mask = npt.NDArray[np.bool_]

#: Number of bands per integer bit mask.
_BITS = 62


@dataclass(frozen=True)
class Selection:
    """Definition of samples.

    Attributes:
        sensors: Keys of the sensors, in canonical order.
        reference: The sensor on whose grids samples are read.
        bands: Names of the channels.
        allow_missing: Sensors that may be missing in a sample.
        window_size: Height and width of the windows in pixels; None for whole observations.
        edge: Treatment of the remainder at the edge of an observation.
        max_day_gap: Maximum number of days between an observation and that of the reference sensor.
        min_overlap: Smallest fraction of a window, 0 to 1, that each sensor must cover.
    """

    sensors: tuple[str, ...]
    reference: str
    bands: tuple[str, ...]
    allow_missing: tuple[str, ...]
    window_size: int | None
    edge: Edge
    max_day_gap: int | None
    min_overlap: float


def build_samples(archive: Archive, selection: Selection, left_out: LeftOut) -> ArchiveTable:
    """Find the samples of an archive.

    Args:
        archive: A table and its observations.
        selection: Definition of the samples.
        left_out: Receives counts of what is left out.

    Returns:
        The samples, in which those of a place are adjacent.

    Raises:
        TableError: If the table has no row of a sensor, a file is not scanned, or the grids of
            files of a place are incompatible.
    """
    _note_problems(archive.table, left_out)
    groups = {key: _observations_of(archive, key, selection, left_out) for key in selection.sensors}
    reference = groups[selection.reference]
    _note_lone_places(archive, groups, selection, left_out)
    scenes = _frames(archive, reference)
    windows = window_grid(scenes.shape, selection.window_size, selection.edge)
    numbers = np.full((len(windows.scene), len(selection.sensors)), -1, np.int32)
    overlap = np.ones(len(numbers), np.float32)
    for i, key in enumerate(selection.sensors):
        if key == selection.reference:
            numbers[:, i] = reference[windows.scene]
            continue
        rule = Rule(SENSORS[key].static, selection.max_day_gap, selection.min_overlap)
        numbers[:, i] = _match(archive, (scenes, windows), groups[key], rule, overlap)
        _check_grids(archive, numbers[:, i], reference[windows.scene])
    kept = _complete(archive, numbers, selection, left_out)
    order: Any = np.flatnonzero(kept)
    if len(windows.scene) > len(scenes.place):
        order = order[_by_place(scenes, windows.take(order))]
    elif kept.all():
        # Avoid a copy of millions of samples.
        order = slice(None)
    offsets = np.stack((windows.row[order], windows.col[order]), axis=1)
    return ArchiveTable(
        archive,
        selection.sensors,
        selection.reference,
        numbers[order],
        offsets,
        overlap[order],
        selection.window_size,
    )


def _match(
    archive: Archive,
    of: tuple[Frames, Windows],
    group: npt.NDArray[np.int32],
    rule: Rule,
    overlap: npt.NDArray[np.float32],
) -> npt.NDArray[np.int32]:
    """Return the observation of a group for each window, or -1; update *overlap* to the minimum."""
    chosen, covered = match_windows(*of, _frames(archive, group), rule)
    found = chosen >= 0
    np.minimum(overlap, covered, out=overlap, where=found)
    chosen[found] = group[chosen[found]]
    return chosen


def _note_problems(table: RasterTable, left_out: LeftOut) -> None:
    """Record the files with a problem."""
    for code, problem in enumerate(table.problems):
        bad = np.flatnonzero(table.problem == code)
        if len(bad):
            left_out.add(f'file with a problem ({problem})', len(bad), table.path(int(bad[0])))


def _note_lone_places(
    archive: Archive,
    groups: dict[str, npt.NDArray[np.int32]],
    selection: Selection,
    left_out: LeftOut,
) -> None:
    """Record the places that have other sensors but not the reference sensor."""
    place = archive.observations.place
    # The last entry is for observations without a place, which may match any place.
    shown = np.zeros(len(archive.table.places) + 1, bool)
    shown[place[groups[selection.reference]]] = True
    if shown[-1]:
        return
    shown[-1] = True
    for key, numbers in groups.items():
        lone = numbers[~shown[place[numbers]]]
        if len(lone):
            left_out.add(
                f'place with {key} but without the reference sensor {selection.reference} '
                '(choose another one with reference=...)',
                len(np.unique(place[lone])),
                archive.table.path(int(archive.main.array[lone[0]])),
            )


def _observations_of(
    archive: Archive, key: str, selection: Selection, left_out: LeftOut
) -> npt.NDArray[np.int32]:
    """Return the observations of a sensor that have the requested bands."""
    table, observations = archive.table, archive.observations
    of_sensor = np.zeros(len(observations), bool)
    if key in table.sensors:
        of_sensor = observations.sensor == table.sensors.index(key)
    if not of_sensor.any():
        known = ', '.join(sorted(table.sensors)) or 'none'
        raise TableError(
            f"{table.source}: no file of the sensor '{key}' can be used; it has {known}"
        )
    numbers = np.flatnonzero(of_sensor).astype(np.int32)
    main = archive.main.array[numbers]
    unknown = np.flatnonzero(table.height[main] <= 0)
    if len(unknown):
        row = int(main[unknown[0]])
        raise TableError(
            f"{table.source}: row {row + 1}: {table.path(row)} is not scanned; run 'geofm index' "
            'on the table'
        )
    lacks = ~_has_bands(archive, numbers, selection.bands, key)
    if lacks.any():
        example = table.path(int(main[np.flatnonzero(lacks)[0]]))
        reason = f'observation of {key} without some of the requested bands'
        left_out.add(reason, int(lacks.sum()), example)
    return numbers[~lacks]


def _has_bands(
    archive: Archive, numbers: npt.NDArray[np.int32], bands: Sequence[str], key: str
) -> Mask:
    """Return whether observations have all requested bands of a sensor, as far as known."""
    table, observations = archive.table, archive.observations
    wanted = [bands[i] for i in sensor_channels(bands)[key]]
    band = table.band[observations.order]
    if not len(band):
        return np.ones(0, bool)
    complete = np.ones(len(numbers), bool)
    # Use one bit per band, in as many integers as necessary.
    for first in range(0, len(wanted), _BITS):
        part = wanted[first : first + _BITS]
        masks = [
            sum(1 << i for i, name in enumerate(part) if name in names)
            for names in table.band_lists
        ]
        # If the table does not list the bands of a file, assume that it has all; reading will
        # check.
        every = (1 << len(part)) - 1
        has = np.array([*masks, every], np.int64)[band]
        together = np.bitwise_or.reduceat(has, observations.first)
        complete &= together[numbers] == every
    return complete


def available_bands(table: RasterTable, key: str) -> tuple[str, ...]:
    """Return the bands of a sensor that the files of a table have.

    Args:
        table: The table.
        key: Key of the sensor.

    Returns:
        Names of the channels in the order of the sensor: those that the table lists, or all if it
        does not list the bands of a file.
    """
    every = SENSORS[key].band_names
    if key not in table.sensors:
        return every
    lists = np.unique(table.band[table.sensor == table.sensors.index(key)]).tolist()
    if -1 in lists:
        return every
    named = {band for number in lists for band in table.band_lists[number]}
    return tuple(band for band in every if band in named)


def _frames(archive: Archive, numbers: npt.NDArray[np.int32]) -> Frames:
    """Return place and time of observations."""
    place, time = archive.observations.place[numbers], archive.observations.time[numbers]
    return Frames(place, time, archive.main.array[numbers], archive.table)


def _check_grids(
    archive: Archive, others: npt.NDArray[np.int32], references: npt.NDArray[np.int32]
) -> None:
    """Raise an error if matched files have incompatible grids."""
    table = archive.table
    matched = others >= 0
    others, references = others[matched], references[matched]
    other, main = archive.main.array[others], archive.main.array[references]
    has_crs = table.epsg[main] > 0
    lone = np.flatnonzero(has_crs & (table.epsg[other] <= 0))
    if len(lone):
        raise TableError(
            f'{table.source}: {table.path(int(other[lone[0]]))} has no CRS, but '
            f'{table.path(int(main[lone[0]]))} of the same place has one: give both a CRS, or none'
        )
    size = (table.height[other] != table.height[main]) | (table.width[other] != table.width[main])
    wrong = np.flatnonzero(~has_crs & size)
    if len(wrong):
        one, two = (int(rows[wrong[0]]) for rows in (other, main))
        raise TableError(
            f'{table.source}: {table.path(one)} is {table.height[one]} x {table.width[one]} '
            f'pixels, but {table.path(two)} of the same place is {table.height[two]} x '
            f'{table.width[two]}: without a CRS all sensors of a place must have one size'
        )


def _complete(
    archive: Archive, numbers: npt.NDArray[np.int32], selection: Selection, left_out: LeftOut
) -> Mask:
    """Return which windows have all required sensors."""
    kept = np.ones(len(numbers), bool)
    main = archive.main.array[numbers[:, selection.sensors.index(selection.reference)]]
    for i, key in enumerate(selection.sensors):
        if key in selection.allow_missing:
            continue
        gone = np.flatnonzero(kept & (numbers[:, i] < 0))
        if len(gone):
            days = (
                f' within {selection.max_day_gap} days' if selection.max_day_gap is not None else ''
            )
            reason = (
                f'sample without {key} of the place{days} that covers '
                f'{selection.min_overlap:.0%} or more (allow_missing=[{key!r}] keeps them)'
            )
            left_out.add(reason, len(gone), archive.table.path(int(main[gone[0]])))
            kept[gone] = False
    return kept


def _by_place(scenes: Frames, windows: Windows) -> npt.NDArray[np.intp]:
    """Return the order of windows by place, then by window, then by date."""
    place = scenes.place[windows.scene].astype(np.int64)
    # Windows without a place are grouped by scene, after all places.
    lone = place < 0
    place[lone] = windows.scene[lone] + place.max(initial=0) + 1
    time = scenes.time[windows.scene]
    return np.asarray(np.lexsort((windows.scene, time, windows.col, windows.row, place)), np.intp)
