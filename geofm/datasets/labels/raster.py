"""Labels from rasters of classes or numbers."""

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from geofm.datasets.labels.source import LabelError, LabelSource, check_values, legend_of_values
from geofm.grid import Grid, read_on_grid
from geofm.legend import NO_CLASS, Legend, LegendError
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
