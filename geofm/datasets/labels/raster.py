"""Labels from rasters of classes or numbers."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from geofm import lonlat
from geofm.datasets.labels.source import LabelError, LabelSource, check_values, legend_of_values
from geofm.grid import Grid, read_on_grid
from geofm.legend import NO_CLASS, Legend, LegendError, MapClass
from geofm.rasters import open_raster

#: Number of pixels read at once to find the values that occur.
_AT_ONCE = 1 << 24


class RasterLabels(LabelSource):
    """Labels from a raster with one band of classes or numbers.

    Attributes:
        path: The file.
        grid: Its grid.
    """

    def __init__(self, path: Path, legend: Legend | None = None) -> None:
        """Initialize a new RasterLabels instance.

        Args:
            path: The file.
            legend: The classes. Default: those in the tags of the file, or else those of its colour
                table and the values that occur.

        Raises:
            LabelError: If the file cannot be used.
        """
        self.path = path
        self._legend = legend
        with self._open() as src:
            if src.count != 1:
                raise LabelError(f'{path}: has {src.count} bands; a raster of labels must have one')
            try:
                self.grid = Grid.of(src)
            except ValueError as error:
                raise LabelError(str(error)) from error

    @cached_property
    def legend(self) -> Legend:
        """The classes."""
        if self._legend is not None:
            return self._legend
        with self._open() as src:
            try:
                tagged = Legend.from_tags(src.tags())
            except LegendError as error:
                raise LabelError(f'{self.path}: its legend is invalid: {error}') from error
            if tagged is not None:
                return tagged
            colors = _color_table(src)
            values = {*colors, *self._values(src)}
        if not values:
            raise LabelError(f'{self.path}: no pixel has a class')
        names = legend_of_values(sorted(values))
        return Legend.of(
            {
                c.name: {'value': c.value, 'color': colors.get(c.value, c.color)}
                for c in names.classes
            }
        )

    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Return the classes of the nearest pixels on a grid."""
        numbers = self.numbers_on(grid)
        known = np.isfinite(numbers) & (numbers != NO_CLASS)
        check_values(self.path, numbers[known], self._legend, _REMEDY)
        return np.where(known, numbers, NO_CLASS).astype(np.uint8)

    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Return the numbers of the nearest pixels on a grid."""
        try:
            with self._open() as src:
                pixels, valid = read_on_grid(src, grid, Resampling.nearest)
        except RasterioError as error:
            raise LabelError(f'{self.path}: cannot be read: {error}') from error
        return np.where(valid, pixels[0], np.float32(np.nan))

    def _values(self, src: DatasetReader) -> set[int]:
        """Return the class values that occur."""
        rows = max(1, _AT_ONCE // src.width)
        found: set[int] = set()
        grid = Grid.of(src)
        for row in range(0, src.height, rows):
            part = grid.crop(row, 0, min(rows, src.height - row), src.width)
            found.update(map(int, np.unique(self.classes_on(part))))
        return found - {NO_CLASS}

    def _open(self) -> DatasetReader:
        try:
            return open_raster(self.path)
        except (OSError, ValueError) as error:
            raise LabelError(str(error)) from error


_REMEDY = (
    'if such pixels have no label, make this value the nodata value of the file '
    '(`rio edit-info --nodata VALUE FILE`), otherwise correct the classes'
)


def _color_table(src: DatasetReader) -> dict[int, tuple[int, int, int]]:
    """Return the colours of classes. TIFF pads its table with black, which is ignored."""
    try:
        table = src.colormap(1)
    except ValueError:
        return {}
    colors = {
        value: color[:3]
        for value, color in table.items()
        if value not in (NO_CLASS, src.nodata) and any(color[:3])
    }
    # A full table is a colour ramp for numbers and not a legend.
    return colors if len(colors) < NO_CLASS - 1 else {}


class MosaicLabels(LabelSource):
    """Labels in several files, e.g. one raster per scene.

    Where files overlap, later ones take precedence.

    Attributes:
        path: The first file.
        sources: The files.
    """

    def __init__(self, sources: Sequence[LabelSource]) -> None:
        """Initialize a new MosaicLabels instance.

        Args:
            sources: The files, at least one.
        """
        self.sources = tuple(sources)
        self.path = self.sources[0].path
        # Files of features have a spatial index themselves.
        rasters = [isinstance(source, RasterLabels) for source in self.sources]
        self._always = np.flatnonzero(~np.array(rasters)).tolist()
        places = np.full(len(rasters), shapely.Point(), object)
        for i, source in enumerate(self.sources):
            if isinstance(source, RasterLabels):
                places[i] = _place(source.grid)
        self._places = shapely.STRtree(places)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the labels."""
        return tuple(source.path for source in self.sources)

    @cached_property
    def legend(self) -> Legend:
        """The classes of all files.

        Raises:
            LabelError: If a class value has different names in different files.
        """
        classes: dict[int, MapClass] = {}
        for source in self.sources:
            for c in source.legend.classes:
                other = classes.setdefault(c.value, c)
                if other.name != c.name:
                    raise LabelError(
                        f"{source.path}: the value {c.value} is '{c.name}', but "
                        f"'{other.name}' in other files; give the classes with their values"
                    )
        try:
            return Legend(tuple(classes.values()))
        except LegendError as error:
            raise LabelError(f'{self.path} and others: {error}; give the classes') from error

    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Return the classes on a grid."""
        values = np.full(grid.shape, NO_CLASS, np.uint8)
        for source in self._near(grid):
            found = source.classes_on(grid)
            np.copyto(values, found, where=found != NO_CLASS)
        return values

    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Return the numbers on a grid."""
        values = np.full(grid.shape, np.nan, np.float32)
        for source in self._near(grid):
            found = source.numbers_on(grid)
            np.copyto(values, found, where=np.isfinite(found))
        return values

    def _near(self, grid: Grid) -> list[LabelSource]:
        """Return the files that may have labels on a grid."""
        found: Any = self._places.query(_place(grid), predicate='intersects')
        return [self.sources[i] for i in sorted({*self._always, *found.tolist()})]


def _place(grid: Grid) -> Any:
    """Return the outline of a grid in longitude and latitude, cut at 180 degrees."""
    # Raises an error if the grid has no position on the Earth.
    grid.footprint(lonlat.LONLAT)
    (outline,) = lonlat.outlines(lonlat.boundary(grid)[None])
    return shapely.Point() if outline is None else outline


def files_at(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that a path or pattern of a configuration stands for.

    Args:
        path: A file, a pattern such as ``'masks/*.tif'``, or a list of these.

    Returns:
        The files. Those of a pattern are sorted.

    Raises:
        LabelError: If no file matches a pattern, or the list is empty.
    """
    names = [path] if isinstance(path, str | Path) else list(path)
    files: list[Path] = []
    for name in map(Path, names):
        if not name.exists() and any(character in str(name) for character in '*?['):
            root = Path(name.anchor)
            found = sorted(root.glob(str(name.relative_to(root))))
            if not found:
                raise LabelError(f'{name}: no file matches this pattern')
            files += found
        else:
            files.append(name)
    if not files:
        raise LabelError('labels: no file is given')
    return files
