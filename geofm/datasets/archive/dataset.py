"""Samples of a table of rasters of any sensors as a TorchGeo dataset."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pyproj
from rasterio.windows import Window
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.archive.archive_table import Archive, ArchiveTable
from geofm.datasets.archive.building import Selection, available_bands, build_samples
from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.archive.mapping import find_samples, open_archive
from geofm.datasets.archive.splits import split_samples
from geofm.datasets.archive.windowing import Edge
from geofm.datasets.footprints import SEARCH_CRS, extents
from geofm.datasets.pairs.dataset import EmptySplitError, MatchedDataset, OnError
from geofm.datasets.pairs.reading import BrokenFileError, Place, Target, read_plain
from geofm.datasets.pairs.table import MIN_OVERLAP, check_overlap
from geofm.datasets.splitting import SPLITS, Split, SplitRule
from geofm.datasets.table import RasterTable, read_observation
from geofm.rasters import RASTER_ERRORS
from geofm.sensors import (
    SENSORS,
    BandError,
    canonical_order,
    check_bands,
    reference_sensor,
    sensor_channels,
)


class RasterArchive(MatchedDataset):
    """Samples of a table of rasters, for any sensors, file layout and scene size.

    Each observation of the reference sensor is a sample, or is divided into a regular grid of
    windows of *window_size*. It is matched with the observations of the other sensors that are
    nearest in time, among those with the same ``place`` in the table or, if the place is missing,
    among those whose footprints overlap it. Static sensors (such as an elevation model) and files
    without a date match any date. All files are read on the grid of the reference sensor. Files on
    another grid are warped by the resampling method of their sensor.

    Files without a CRS are matched by ``place`` only, and must have the same size within a place.
    Their samples have no 'bounds', 'transform' and 'crs', and cannot be read by slices.

    Samples with a missing sensor are left out, unless it is in *allow_missing*. What is left out is
    counted in :attr:`skipped` and reported in one warning.

    The columns of :attr:`index` are described at
    :meth:`geofm.datasets.archive.archive_table.ArchiveTable.frame`. Its CRS is that of the
    reference files if they all have the same, and EPSG:4326 otherwise.

    Attributes:
        table: The table.
        sensors: Keys of the sensors, in canonical order.
        reference: The sensor that gives the grid.
        bands: Names of the channels of 'image'.
        split: The split.
        skipped: Number of samples and files left out, by reason.
    """

    matches: ArchiveTable

    def __init__(
        self,
        table: Archive | RasterTable | Path,
        sensors: Sequence[str],
        bands: Sequence[str] | None = None,
        reference: str | None = None,
        split: Split = 'train',
        split_by: SplitRule | Mapping[str, Any] | None = None,
        window_size: int | None = None,
        edge: Edge = 'shift',
        max_day_gap: int | None = None,
        min_overlap: float = MIN_OVERLAP,
        allow_missing: Sequence[str] = (),
        transforms: Callable[[Sample], Sample] | None = None,
        on_error: OnError = 'raise',
    ) -> None:
        """Initialize a new RasterArchive instance.

        Args:
            table: A table of rasters, or its file, as written by ``geofm index``. A large table is
                read once per machine, see :mod:`geofm.datasets.archive.mapping`.
            sensors: Keys of the sensors, in any order.
            bands: Names of the bands to return, in this order, with at least one per sensor.
                Default: all bands of the sensors that the files of the table have.
            reference: The sensor on whose grid samples are read. Default: that of
                :func:`geofm.sensors.reference_sensor`.
            split: One of 'train', 'val', 'test' or 'all'.
            split_by: Rule by which samples are split, a
                :class:`~geofm.datasets.SplitRule` or its fields. Default: by the column
                'split' of the table; if there is none, all samples are in 'train'.
            window_size: Height and width, in pixels, of the windows into which each observation of
                the reference sensor is divided. Default: whole observations.
            edge: Treatment of a remainder at the lower and right edge: 'shift' the last window
                inwards, so that it overlaps its neighbour, or 'drop' the remainder.
            max_day_gap: Maximum number of days between an observation and that of the reference
                sensor.
            min_overlap: Smallest fraction of a sample, 0 to 1, that each sensor must cover.
            allow_missing: Sensors that may be missing in a sample. Samples then have 'present', and
                the channels of missing sensors are 0.
            transforms: Applied to each sample after everything else.
            on_error: What to do if a file cannot be read: 'raise' an error that names the file, or
                'skip' the sample. A skipped sample is replaced by another one of the same size,
                drawn from PyTorch's global generator, and counted in :attr:`failures`.

        Raises:
            BandError: If a band is unknown, given twice, or not a band of the sensors.
            EmptySplitError: If there is no sample in *split*. It is a ValueError.
            SensorError: If a sensor is unknown. It is a ValueError.
            TableError: If the table cannot be used. It is a ValueError.
            ValueError: If another argument is out of range.
        """
        for name, value, known in (
            ('split', split, get_args(Split)),
            ('edge', edge, get_args(Edge)),
            ('on_error', on_error, get_args(OnError)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose from {list(known)}")
        if window_size is not None and window_size < 1:
            raise ValueError(f'window_size must be a positive number of pixels, not {window_size}')
        if max_day_gap is not None and max_day_gap < 0:
            raise ValueError(f'max_day_gap must be 0 days or more, not {max_day_gap}')
        super().__init__(transforms, on_error)
        if not isinstance(table, Archive | RasterTable):
            table = os.fspath(table)
        archive = open_archive(table)
        self.table = archive.table
        self.paths = self.table.source
        self.split = split
        self.split_by = SplitRule(**split_by) if isinstance(split_by, Mapping) else split_by
        self.sensors = canonical_order(sensors)
        self.reference = _check_reference(reference, self.sensors)
        self.allow_missing = _check_missing(allow_missing, self.sensors, self.reference)
        self.bands = _bands_of(self.table, self.sensors, bands)
        self.window_size = window_size
        selection = Selection(
            self.sensors,
            self.reference,
            self.bands,
            self.allow_missing,
            window_size,
            edge,
            max_day_gap,
            check_overlap(min_overlap),
        )
        self.matches, self.skipped = self._matches(archive, selection)  # type: ignore[assignment]
        self.skipped.warn()
        self._choose_crs()

    @property
    def all_bands(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of all bands of the sensors."""
        return tuple(band for sensor in self.sensors for band in SENSORS[sensor].band_names)

    @property
    def is_georeferenced(self) -> bool:
        """Whether the files have a CRS, so that samples have a location."""
        return bool((self.matches.epsg(np.arange(min(len(self), 1))) > 0).all())

    def __str__(self) -> str:
        """Describe the dataset."""
        if self.is_georeferenced:
            return super().__str__()
        return f'{type(self).__name__} Dataset\n    type: NonGeoDataset\n    size: {len(self)}'

    def _check_ground(self) -> None:
        """Raise an error if samples have no location."""
        if not self.is_georeferenced:
            raise ValueError(
                f'{self.table.source}: its files have no CRS, so samples have no '
                'location: read them by their index, dataset[0], with a plain PyTorch sampler; or '
                'assign a CRS to the files and index them again'
            )

    def _matches(self, archive: Archive, selection: Selection) -> tuple[ArchiveTable, LeftOut]:
        """Find the samples of the split, and what is left out."""

        def every() -> tuple[ArchiveTable, LeftOut]:
            left_out = LeftOut()
            return build_samples(archive, selection, left_out), left_out

        samples, left_out = find_samples(archive, selection, (), every)

        def in_split() -> tuple[ArchiveTable, LeftOut]:
            return self._in_split(samples, left_out), left_out

        if self.split == 'all':
            return in_split()
        return find_samples(archive, selection, (self.split, self.split_by), in_split)

    def _in_split(self, samples: ArchiveTable, left_out: LeftOut) -> ArchiveTable:
        """Select the samples of the split."""
        every = len(samples)
        if self.split != 'all' and every:
            rule = self.split_by
            if rule is None and self.table.split is not None:
                rule = SplitRule('column')
            if rule is None:
                codes = np.zeros(every, np.int8)
            else:
                codes = split_samples(samples, rule)
                _note_crossing(samples, codes, rule, left_out)
            samples = samples.take(np.flatnonzero(codes == SPLITS.index(self.split)))
        if not len(samples):
            why = f"in split='{self.split}'" if every else 'with all sensors'
            raise EmptySplitError(
                f'{self.table.source}: no sample {why}; {every} in all splits'
                + (f'; left out: {left_out}' if left_out else '')
                + (
                    ''
                    if self.split_by or self.table.split is not None or not every
                    else "; set split_by, or add a column 'split' to the table"
                )
            )
        return samples

    def _choose_crs(self) -> None:
        """Choose CRS and resolution of the index: those of the files if they have a common CRS."""
        if not self.is_georeferenced:
            self._res = (1.0, 1.0)
            return
        codes = np.unique(self.matches.epsg(slice(None)))
        first = np.arange(1)
        if len(codes) == 1:
            self._search_in(pyproj.CRS(int(codes[0])))
            a, b, _, d, e, _ = self.matches.transforms(first)[0]
            self._res = (float(np.hypot(a, d)), float(np.hypot(b, e)))
            return
        west, south, east, north = extents(self.matches.corners(first, SEARCH_CRS), SEARCH_CRS)[0]
        height, width = self.matches.sizes(first)[0]
        self._res = (float((east - west) / width), float((north - south) / height))

    def _read(
        self, position: int, sensor: str, bands: tuple[str, ...], place: Place, target: Target
    ) -> bool:
        """Read the bands of a sensor, and return whether the sample has it."""
        rows = self.matches.rows_of(position, sensor)
        if rows is None:
            return False
        if self._is_plain(rows, sensor):
            path = self.table.path(int(rows[0]))
            try:
                if read_plain(path, bands, SENSORS[sensor], place, target):
                    return True
            except RASTER_ERRORS as err:
                raise BrokenFileError(path, err.__cause__ or err) from err
        row, col, height, width = place.extent
        window = None if place.grid is not None else Window(col, row, width, height)
        values, valid = read_observation(self.table, rows, bands, place.grid, window)
        target[0][:] = values
        target[1][:] &= valid
        return True

    def _is_plain(self, rows: Any, sensor: str) -> bool:
        """Check whether the file may be an ordinary TIFF with all bands of the sensor in order."""
        table, definition = self.table, SENSORS[sensor]
        if len(rows) != 1 or not definition.fills_zero or definition.nodata:
            return False
        row = int(rows[0])
        columns = (table.scale, table.offset, table.nodata)
        given = any(column is not None and not np.isnan(column[row]) for column in columns)
        given |= table.unit is not None and table.unit[row] >= 0
        if given or table.band[row] >= 0 or table.index[row] >= 0:
            return False
        path = table.path(row)
        return path.lower().endswith(('.tif', '.tiff')) and os.path.lexists(path)

    def _check_not_empty(self, position: int, place: Place) -> None:
        """Accept samples without a valid pixel, as scenes have margins without data."""


def _note_crossing(samples: ArchiveTable, codes: Any, rule: SplitRule, left_out: LeftOut) -> None:
    """Record the samples that are in no split."""
    gone = np.flatnonzero(codes < 0)
    if len(gone):
        reasons = {
            'blocks': 'sample extending into a block of another split',
            'column': 'sample without a split in the table',
        }
        paths = samples.paths(int(gone[0]), samples.reference)
        left_out.add(reasons[rule.by], len(gone), paths[0])


def _check_reference(reference: str | None, sensors: tuple[str, ...]) -> str:
    """Return the reference sensor."""
    if reference is None:
        return reference_sensor(sensors)
    if reference not in sensors:
        raise ValueError(f"reference '{reference}' is not one of the sensors {list(sensors)}")
    return reference


def _check_missing(
    allow_missing: Sequence[str], sensors: tuple[str, ...], reference: str
) -> tuple[str, ...]:
    """Return the sensors that may be missing."""
    if isinstance(allow_missing, str) or not set(allow_missing) <= set(sensors) - {reference}:
        raise ValueError(
            f'allow_missing {allow_missing!r} must be a list of sensors other than the reference '
            f"'{reference}': choose from {[key for key in sensors if key != reference]}"
            + (
                f'; to allow a missing {reference}, choose another reference'
                if reference in allow_missing
                else ''
            )
        )
    return tuple(key for key in sensors if key in allow_missing)


def _bands_of(
    table: RasterTable, sensors: tuple[str, ...], bands: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the bands to return, which must include each sensor."""
    if bands is None:
        return tuple(band for key in sensors for band in available_bands(table, key))
    names = check_bands(bands)
    given = set(sensor_channels(names))
    if given != set(sensors):
        others = sorted(given - set(sensors))
        raise BandError(
            f'some bands are of the sensors {others}, which are not in sensors={list(sensors)}'
            if others
            else f'no bands of {sorted(set(sensors) - given)}: add some, or remove the sensors'
        )
    return names
