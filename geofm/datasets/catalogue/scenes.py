"""The scenes of catalogues as compact arrays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geofm.datasets.memory.path_list import PathList
from geofm.sensors import DEFAULT_SENSORS

#: Index of each sensor.
SENSOR_NUMBERS = {key: number for number, key in enumerate(DEFAULT_SENSORS)}

#: Day of a file whose name has no date.
NO_DAY = int(np.iinfo(np.int32).min)

#: Columns of a catalogue that describe a file and its problems.
_FACTS = (
    'path',
    'sensor',
    'season',
    'roi',
    'patch',
    'time_step',
    'date',
    'cloud_cover',
    'names',
    'problem',
)

#: Columns that describe the grid of a file.
_GRID = ('epsg', 'transform', 'height', 'width')

type Int32 = npt.NDArray[np.int32]

#: Indices of files or pairs.
type Rows = npt.NDArray[np.integer[Any]]


class Source(NamedTuple):
    """Source of rows that describe files.

    Attributes:
        root: Folder that paths are relative to; '' if they are complete.
        batches: Function that iterates over batches of the named columns, from the first row.
    """

    root: str
    batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]


class Grids(NamedTuple):
    """Grids of consecutive files.

    Attributes:
        first: Index of the first file.
        epsg: EPSG code, shape (N,); -1 where unknown.
        transform: Affine coefficients a to f, shape (N, 6).
        shape: Height and width, shape (N, 2).
    """

    first: int
    epsg: Int32
    transform: npt.NDArray[np.float64]
    shape: Int32


@dataclass(frozen=True)
class Scenes:
    """Table of the files of SEN12MS-CR-TS or SEN12MS-CR, with one array per column.

    Attributes:
        sources: Sources of the rows.
        paths: Path of each file.
        sensor: Index of the sensor; -1 if the file name cannot be parsed.
        season: Index into :attr:`seasons`; -1 if the file name cannot be parsed.
        roi: Number of the ROI.
        patch: Number of the patch.
        time_step: Number of the time step.
        day: Days since 1970-01-01; :data:`NO_DAY` if the name has no date.
        cloud_cover: Cloud-covered fraction, 0 to 1; NaN where unknown.
        names: Index into :attr:`layouts`, the band names of the file.
        problem: Index into :attr:`problems`; -1 if the file can be used.
        seasons: Names of the seasons, sorted.
        problems: Reasons why files must not be used.
        layouts: Each list of band names that occurs in a file, as one string separated by spaces;
            '' for files without band names.
    """

    sources: Sequence[Source]
    paths: PathList
    sensor: npt.NDArray[np.int8]
    season: Int32
    roi: Int32
    patch: Int32
    time_step: Int32
    day: Int32
    cloud_cover: npt.NDArray[np.float32]
    names: Int32
    problem: Int32
    seasons: tuple[str, ...]
    problems: tuple[str, ...]
    layouts: tuple[str, ...]

    @classmethod
    def read(cls, sources: Sequence[Source]) -> 'Scenes':
        """Read the columns of all files.

        Args:
            sources: Sources of the rows.

        Returns:
            The files of all sources, in order.
        """
        seasons, problems, layouts = _Names(), _Names(), _Names()
        parts: list[dict[str, npt.NDArray[np.generic]]] = []

        def paths() -> Iterator[pa.StringArray]:
            for source in sources:
                for batch in source.batches(_FACTS):
                    parts.append(_facts(batch, seasons, problems, layouts))
                    path = batch.column('path')
                    yield (
                        pc.binary_join_element_wise(source.root, path, '/') if source.root else path
                    )

        found = PathList(paths())
        parts.append({name: np.empty(0, kind) for name, kind in _KINDS.items()})
        # Column by column, so that only one column is in memory twice at a time.
        columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in _KINDS}
        columns['season'], names = seasons.sorted(columns['season'])
        return cls(
            sources,
            found,
            **columns,
            seasons=names,
            problems=tuple(problems.numbers),
            layouts=tuple(layouts.numbers),
        )

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.sensor)

    def places(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return a number per season, ROI and patch of files, sorted like these.

        Args:
            rows: Indices of the files.

        Returns:
            The numbers, which are not negative.
        """
        return _pack([self.season[rows], self.roi[rows], self.patch[rows]])

    def keys(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return a number per season, ROI, patch and time step of files, sorted like these.

        Args:
            rows: Indices of the files.

        Returns:
            The numbers, which are not negative.
        """
        return _pack([self.season[rows], self.roi[rows], self.patch[rows], self.time_step[rows]])


def read_grids(sources: Sequence[Source]) -> Iterator[Grids]:
    """Read the grids of all files in batches, as together they would take much memory.

    Args:
        sources: Sources of the rows.

    Yields:
        Grids of consecutive files.
    """
    first = 0
    for source in sources:
        for batch in source.batches(_GRID):
            yield Grids(
                first,
                _integers(batch.column('epsg')),
                _affine(batch.column('transform')),
                np.stack([_integers(batch.column(name)) for name in ('height', 'width')], 1),
            )
            first += len(batch)


_KINDS = {
    'sensor': np.int8,
    'season': np.int32,
    'roi': np.int32,
    'patch': np.int32,
    'time_step': np.int32,
    'day': np.int32,
    'cloud_cover': np.float32,
    'names': np.int32,
    'problem': np.int32,
}


class _Names:
    """Numbers given to names in order of first occurrence."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, column: pa.Array) -> Int32:
        """Return the numbers of a column of names, -1 where missing."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        names = column.dictionary.to_pylist()
        ours = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        codes = column.indices.fill_null(len(ours)).to_numpy(zero_copy_only=False)
        return np.array([*ours, -1], np.int32)[codes]

    def sorted(self, numbers: npt.NDArray[np.generic]) -> tuple[Int32, tuple[str, ...]]:
        """Renumber in the order of the sorted names; return the numbers and the names."""
        names = sorted(self.numbers)
        place = np.full(len(names) + 1, -1, np.int32)
        for rank, name in enumerate(names):
            place[self.numbers[name]] = rank
        return place[numbers.astype(np.int32)], tuple(names)


def _facts(
    batch: pa.RecordBatch, seasons: _Names, problems: _Names, layouts: _Names
) -> dict[str, npt.NDArray[np.generic]]:
    """Convert the columns of a batch to arrays."""
    sensors = _Names()
    sensors.numbers = dict(SENSOR_NUMBERS)
    day = batch.column('date').cast(pa.int32()).fill_null(NO_DAY)
    cloud_cover = batch.column('cloud_cover').fill_null(float('nan'))
    return {
        'sensor': sensors.of(batch.column('sensor')).astype(np.int8),
        'season': seasons.of(batch.column('season')),
        **{name: _integers(batch.column(name)) for name in ('roi', 'patch', 'time_step')},
        'day': day.to_numpy(zero_copy_only=False).copy(),
        'cloud_cover': cloud_cover.to_numpy(zero_copy_only=False).copy(),
        'names': layouts.of(batch.column('names')),
        'problem': problems.of(batch.column('problem')),
    }


def _integers(column: pa.Array) -> Int32:
    """Convert a column of integers, with -1 where missing."""
    # Copy, as a view would keep the whole batch in memory.
    return np.array(column.fill_null(-1).to_numpy(zero_copy_only=False), np.int32)


def _affine(column: pa.FixedSizeListArray) -> npt.NDArray[np.float64]:
    """Return affine coefficients, shape (N, 6), NaN where missing."""
    # flatten() would leave out missing values.
    flat = column.values.slice(6 * column.offset, 6 * len(column))
    rows = flat.to_numpy(zero_copy_only=False).reshape(-1, 6)
    if column.null_count:
        rows = rows.copy()
        rows[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return rows


def _pack(columns: Sequence[Int32]) -> npt.NDArray[np.int64]:
    """Combine columns into one number per row that sorts like the columns."""
    sizes = [int(column.max(initial=0)) + 2 for column in columns]
    packed = np.zeros(len(columns[0]), np.int64)
    count = 1
    for column, size in zip(columns, sizes, strict=True):
        count *= size
        if count >= 2**62:
            # Avoid an overflow, which real data do not cause: number the values that occur.
            packed = np.unique(packed, return_inverse=True)[1].astype(np.int64)
            count = (int(packed.max(initial=0)) + 1) * size
        packed *= size
        packed += column
        packed += 1
    return packed
