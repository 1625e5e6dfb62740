"""Scenes of a table of rasters, read with the bands of a model as in training."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rasterio.windows import Window
from torch import Tensor

from geofm.datasets import SplitRule
from geofm.datasets.archive import RasterArchive, Split, available_bands
from geofm.datasets.labels import LabelError, LabelSource, check_values
from geofm.datasets.table import NO_TIME, RasterTable, TableError, open_table, read_observation
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend
from geofm.maps.scene.scene import Missing
from geofm.printing import warn
from geofm.sensors import (
    SENSORS,
    BandError,
    canonical_order,
    check_bands,
    date_columns,
    reference_sensor,
    sensor_channels,
    sensor_of,
)
from geofm.suggestions import did_you_mean
from geofm.units import UnitWarning, wrong_unit

#: Side in pixels of the windows from which the unit of a scene is recognised.
_SAMPLE = 64


class TableScene:
    """Rasters of one place and date in a table, as :class:`geofm.maps.scene.Imagery`.

    Attributes:
        bands: Names of the channels.
        grid: The grid of the reference sensor's raster.
        path: The reference sensor's raster.
        stem: Name of the scene.
        missing: Values for a band that no raster of the table has.
        dates: Days of acquisition since 1970-01-01 per sensor of the archive, int64 (S,).
    """

    def __init__(
        self,
        archive: RasterArchive,
        position: int,
        bands: tuple[str, ...],
        stem: str,
        missing: Missing | None,
    ) -> None:
        """Initialize a new TableScene instance.

        Args:
            archive: Archive whose samples are whole observations.
            position: Index of the sample.
            bands: Names of the channels. They include the bands of the archive.
            stem: Name of the scene.
            missing: What fills the other bands of the archive's sensors.

        Raises:
            ValueError: If the files have no CRS.
        """
        grid, _, extent = archive.matches.scene(position)
        paths = archive.matches.paths(position, archive.reference)
        self.path = Path(paths[0])
        if grid is None:
            raise ValueError(f'{self.path}: no CRS, so there is no map of it; assign one')
        self.grid = grid.crop(*extent)
        self.bands = bands
        self.stem = stem
        self.missing = missing
        self._archive = archive
        self._position = position
        self._channels = [bands.index(band) for band in archive.bands]
        self._present = [key for key in archive.sensors if archive.matches.paths(position, key)]
        self.dates = torch.from_numpy(archive.matches.days(position))

    @property
    def absent(self) -> tuple[str, ...]:
        """Keys of the sensors of the bands that have no raster."""
        return tuple(key for key in sensor_channels(self.bands) if key not in self._present)

    @property
    def at_mean(self) -> list[int]:
        """Indices of the channels that are filled with the mean of their band."""
        if self.missing != 'mean':
            return []
        return [i for i in range(len(self.bands)) if i not in self._channels]

    def read(self, row: int, col: int, height: int, width: int) -> dict[str, Tensor]:
        """Read a window, which may reach beyond the scene.

        Args:
            row: First row in pixels of the grid.
            col: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            A sample as of :meth:`geofm.maps.scene.Scene.read`.

        Raises:
            BrokenFileError: If a file cannot be read. It is a ValueError.
        """
        image = torch.zeros(len(self.bands), height, width)
        valid = torch.zeros(height, width, dtype=torch.bool)
        rows = slice(max(row, 0), min(row + height, self.grid.height))
        cols = slice(max(col, 0), min(col + width, self.grid.width))
        window = Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)
        sample = self._archive.read_or_raise(self._position, window)
        inside = (
            slice(rows.start - row, rows.stop - row),
            slice(cols.start - col, cols.stop - col),
        )
        image[:, *inside][self._channels] = sample['image']
        valid[inside] = sample['valid']
        return {'image': image, 'valid': valid, 'dates': sample['dates']}

    def describe(self) -> dict[str, Any]:
        """Identify the files of the scene without reading their pixels.

        Returns:
            Rows of the table by sensor, with the size and modification time of local files; and
            under the key 'bands', the names of the bands that are read.
        """
        table = self._archive.table
        described: dict[str, Any] = {}
        for key in self._present:
            rows = self._archive.matches.rows_of(self._position, key)
            assert rows is not None
            described[key] = [_describe_row(table, int(row)) for row in rows]
        return {**described, 'bands': list(self._archive.bands)}

    def tags(self) -> dict[str, str]:
        """Return the name and date of the first file of each sensor, for the tags of a product."""
        matches = self._archive.matches
        return {
            **{key: Path(matches.paths(self._position, key)[0]).name for key in self._present},
            **{f'{key}_date': str(day) for key, day in self.days.items()},
        }

    @property
    def days(self) -> dict[str, np.datetime64]:
        """Day of acquisition of each sensor that is present, by key; NaT if unknown."""
        columns = date_columns(self._archive.sensors)
        dates = dict(zip(columns, self.dates.numpy().astype('datetime64[D]'), strict=True))
        return {key: dates[key] for key in self._present if key in dates}

    def check_units(self) -> list[str]:
        """Warn of values that seem to be in another unit.

        Only up to nine windows of the scene are read.

        Returns:
            The messages of the warnings.
        """
        starts = [
            sorted({max(0, (s - _SAMPLE) * k // 2) for k in range(3)}) for s in self.grid.shape
        ]
        height, width = (min(_SAMPLE, side) for side in self.grid.shape)
        parts = [self.read(row, col, height, width) for row in starts[0] for col in starts[1]]
        pixels = torch.cat([part['image'][:, part['valid']] for part in parts], dim=1).numpy()
        said = []
        for key, channels in sensor_channels(self._archive.bands).items():
            if key not in self._present:
                continue
            values = pixels[[self._channels[i] for i in channels]]
            found = wrong_unit(values[np.isfinite(values)], SENSORS[key])
            if found is not None:
                advice = found.advice(SENSORS[key])
                said.append(f'{self.stem}: {SENSORS[key].title}: {advice}')
                warn(said[-1], UnitWarning)
        return said


class BandLabels(LabelSource):
    """Labels of one scene that are a band of a table.

    Attributes:
        path: First file of the band.
    """

    def __init__(
        self, table: RasterTable, rows: npt.NDArray[np.integer[Any]], band: str, legend: Legend
    ) -> None:
        """Initialize a new BandLabels instance.

        Args:
            table: The table.
            rows: Rows of the observation that holds the labels.
            band: Name of the band.
            legend: The classes.
        """
        self.path = Path(table.path(int(rows[0])))
        self._table, self._rows, self._band, self._legend = table, rows, band, legend

    @property
    def legend(self) -> Legend:
        """The classes."""
        return self._legend

    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Return classes on a grid, see :meth:`LabelSource.classes_on`."""
        values = self.numbers_on(grid)
        known = np.isfinite(values) & (values != NO_CLASS)
        check_values(self.path, values[known], self._legend, 'add them, or give a nodata value')
        return np.where(known, values, NO_CLASS).astype(np.uint8)

    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Return numbers on a grid, see :meth:`LabelSource.numbers_on`."""
        values, valid = read_observation(self._table, self._rows, (self._band,), grid)
        return np.where(valid, values[0], np.float32(np.nan))


class TableScenes:
    """The scenes of a table: one per observation of the reference sensor.

    Observations of the other sensors are matched to it as in
    :class:`~geofm.datasets.RasterArchive`. Scenes are sorted by place and date.

    Attributes:
        table: The table.
        names: Name of each scene, unique and usable as a folder name: its place and date, or the
            name of the file if it has no place.
        left_out: Which rasters are left out, and why. Empty if none is.
    """

    def __init__(
        self,
        table: Path,
        bands: Sequence[str],
        *,
        split: Split = 'all',
        split_by: SplitRule | None = None,
        window_size: int | None = None,
        places: Sequence[str] | None = None,
        reference: str | None = None,
        missing_bands: Missing | None = None,
        missing_sensors: bool = False,
    ) -> None:
        """Initialize a new TableScenes instance.

        Args:
            table: Table of rasters, as ``geofm index`` writes it.
            bands: Names of the channels.
            split: Split whose scenes are used, or 'all'.
            split_by: How scenes are split. Default: by the column 'split' of the table.
            window_size: Side in pixels of the windows that were split. None: whole scenes.
            places: Names of the places whose scenes are used. Default: all places.
            reference: Sensor whose grid is used. Default: see
                :func:`geofm.sensors.reference_sensor`.
            missing_bands: What fills bands that no raster of the table has. None: a missing band is
                an error.
            missing_sensors: Whether scenes may lack sensors.

        Raises:
            BandError: If the table lacks a band.
            ValueError: If the table lacks a sensor, if no scene is left, or if scenes are split by
                blocks.
        """
        self.bands = check_bands(bands)
        self.table = open_table(table)
        self._missing = missing_bands
        keys = _sensors(self.table, self.bands, missing_sensors)
        main = reference or reference_sensor(keys)
        self._args: dict[str, Any] = {
            'sensors': keys,
            'bands': _bands(self.table, self.bands, keys, missing_bands),
            'reference': main,
            'allow_missing': [key for key in keys if key != main] if missing_sensors else [],
        }
        self._archive = self._open()
        self.left_out = str(self._archive.skipped)
        names = _names(self._archive)
        kept = np.ones(len(names), bool)
        if split != 'all':
            kept &= self._in_split(split, split_by, window_size)
        if places is not None:
            kept &= self._at(places)
        self._positions = np.flatnonzero(kept).tolist()
        if not self._positions:
            raise ValueError(f'{table}: no scene belongs to the chosen places and split')
        self.names = tuple(names[position] for position in self._positions)

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.names)

    def scene(self, number: int) -> TableScene:
        """Return a scene.

        Args:
            number: Index of the scene, from 0.

        Returns:
            The scene.

        Raises:
            ValueError: If its files have no CRS.
        """
        position = self._positions[number]
        return TableScene(self._archive, position, self.bands, self.names[number], self._missing)

    def labels(self, band: str, legend: Legend) -> list[BandLabels | None]:
        """Return the labels of each scene from a band of the table.

        Args:
            band: Name of the band, such as ``landcover.class``.
            legend: The classes.

        Returns:
            The labels of each scene; None for scenes without labels.

        Raises:
            BandError: If the band is unknown.
            ValueError: If the table has no raster of the band, or it is an input of the task.
        """
        (band,) = check_bands([band])
        key = sensor_of(band).name
        if key in self._args['sensors']:
            raise LabelError(f"'{band}' is an input band of the task, so it cannot be the labels")
        args = {
            **self._args,
            'sensors': canonical_order([*self._args['sensors'], key]),
            'bands': [*self._args['bands'], band],
            'allow_missing': [*self._args['allow_missing'], key],
        }
        matches = self._open(**args).matches
        by_number = {int(n): i for i, n in enumerate(matches.reference_observations())}
        numbers = self._archive.matches.reference_observations()
        found: list[BandLabels | None] = []
        for position in self._positions:
            rows = matches.rows_of(by_number[int(numbers[position])], key)
            found.append(None if rows is None else BandLabels(self.table, rows, band, legend))
        return found

    def _open(self, **changed: Any) -> RasterArchive:
        with warnings.catch_warnings():
            # Reported once, by `left_out`.
            warnings.simplefilter('ignore')
            return RasterArchive(self.table, **{**self._args, 'split': 'all', **changed})

    def _in_split(
        self, split: Split, rule: SplitRule | None, window_size: int | None
    ) -> npt.NDArray[np.bool_]:
        if rule is not None and rule.by == 'blocks':
            raise ValueError(
                'a split by blocks divides scenes: omit --split, or split by place or by the '
                'column of the table'
            )
        if rule is None and self.table.split is None:
            raise ValueError(
                f"{self.table.source}: no column 'split': give the rule by which scenes are split, "
                'such as --split_by.by place'
            )
        part = self._open(split=split, split_by=rule, window_size=window_size)
        chosen = part.matches.reference_observations()
        return np.isin(self._archive.matches.reference_observations(), chosen)

    def _at(self, places: Sequence[str]) -> npt.NDArray[np.bool_]:
        known = _places(self._archive)
        for place in places:
            if place not in known:
                guess = did_you_mean(place, [name for name in known if name is not None])
                raise ValueError(f"{self.table.source}: no scene at the place '{place}'{guess}")
        return np.isin(np.array([name or '' for name in known]), list(places))


def _describe_row(table: RasterTable, row: int) -> dict[str, Any]:
    """Describe a row of a table, with the size and modification time of its file."""
    path = table.path(row)
    columns = {
        name: None if column is None else float(column[row])
        for name, column in (
            ('scale', table.scale),
            ('offset', table.offset),
            ('nodata', table.nodata),
        )
    }
    described: dict[str, Any] = {
        'path': path,
        'bands': table.bands_of(row),
        'index': int(table.index[row]),
        'unit': None if table.unit is None or table.unit[row] < 0 else table.units[table.unit[row]],
        # NaN would not compare equal to itself.
        **{name: None if value != value else value for name, value in columns.items()},
    }
    if Path(path).exists():
        stat = Path(path).stat()
        described |= {'size': stat.st_size, 'changed': stat.st_mtime_ns}
    return described


def _sensors(table: RasterTable, bands: tuple[str, ...], missing_sensors: bool) -> tuple[str, ...]:
    """Return the sensors of the bands that the table has rasters of."""
    wanted = canonical_order([*sensor_channels(bands)])
    there = {table.sensors[code] for code in np.unique(table.sensor[table.problem < 0])}
    lacking = [key for key in wanted if key not in there]
    if len(lacking) == len(wanted) or (lacking and not missing_sensors):
        titles = ', '.join(f'{SENSORS[key].title} ({key})' for key in lacking)
        advice = '' if len(lacking) == len(wanted) else ', or give --missing_sensors'
        raise TableError(
            f'{table.source}: no usable raster of {titles}, which the task was fine-tuned with: '
            f'add some{advice}; the table has {", ".join(sorted(there)) or "none"}'
        )
    return tuple(key for key in wanted if key in there)


def _bands(
    table: RasterTable, bands: tuple[str, ...], keys: Sequence[str], missing: Missing | None
) -> tuple[str, ...]:
    """Return the bands that the rasters of the table have."""
    wanted = [band for band in bands if sensor_of(band).name in keys]
    there = {band for key in keys for band in available_bands(table, key)}
    lacking = [band for band in wanted if band not in there]
    if lacking and missing is None:
        raise BandError(
            f"{table.source}: no raster has the bands {lacking}. --missing_bands: 'mean' fills "
            "them with their mean, 'zero' with zeros"
        )
    return tuple(band for band in wanted if band in there)


def _places(archive: RasterArchive) -> list[str | None]:
    """Return the name of the place of each sample."""
    parts = archive.matches.archive
    numbers = archive.matches.reference_observations()
    places = parts.observations.place[numbers].tolist()
    return [None if place < 0 else parts.table.places[place] for place in places]


def _names(archive: RasterArchive) -> list[str]:
    """Return a unique name for each sample."""
    times = archive.matches.archive.observations.time[archive.matches.reference_observations()]
    days = times.astype('datetime64[us]').astype('datetime64[D]')
    names = []
    for i, place in enumerate(_places(archive)):
        base = place or Path(archive.matches.paths(i, archive.reference)[0]).stem
        # Names of places come from outside, and must be valid names of folders.
        base = re.sub(r'[^\w-]', '_', base).strip('_') or 'scene'
        dated = place is not None and times[i] != NO_TIME
        names.append(f'{base}_{days[i]}' if dated else base)
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[i] = f'{name}_{seen[name]}'
    return names
