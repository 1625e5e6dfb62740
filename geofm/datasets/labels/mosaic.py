"""Labels in several files."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from geofm import lonlat
from geofm.datasets.labels.raster import RasterLabels
from geofm.datasets.labels.source import LabelError, LabelSource
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend, LegendError, MapClass


class MosaicLabels(LabelSource):
    """Labels in several files, e.g. a raster per scene; where they overlap, later files win.

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
        # Features have an index of their own.
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
            LabelError: If a class is not the same in all of them.
        """
        classes: dict[int, MapClass] = {}
        for source in self.sources:
            for c in source.legend.classes:
                other = classes.setdefault(c.value, c)
                if other.name != c.name:
                    raise LabelError(
                        f"{source.path}: the value {c.value} is '{c.name}', which is "
                        f"'{other.name}' in other files; name the classes with their values"
                    )
        try:
            return Legend(tuple(classes.values()))
        except LegendError as error:
            raise LabelError(f'{self.path} and others: {error}; name the classes') from error

    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Classes on a grid."""
        values = np.full(grid.shape, NO_CLASS, np.uint8)
        for source in self._near(grid):
            found = source.classes_on(grid)
            np.copyto(values, found, where=found != NO_CLASS)
        return values

    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Numbers on a grid."""
        values = np.full(grid.shape, np.nan, np.float32)
        for source in self._near(grid):
            found = source.numbers_on(grid)
            np.copyto(values, found, where=np.isfinite(found))
        return values

    def _near(self, grid: Grid) -> list[LabelSource]:
        """The files that may have labels on a grid."""
        found: Any = self._places.query(_place(grid), predicate='intersects')
        return [self.sources[i] for i in sorted({*self._always, *found.tolist()})]


def _place(grid: Grid) -> Any:
    """Outline of a grid in longitude and latitude, cut at 180 degrees."""
    # Raises an error where the CRS has no place on the Earth.
    grid.footprint(lonlat.LONLAT)
    (outline,) = lonlat.outlines(lonlat.boundary(grid)[None])
    return shapely.Point() if outline is None else outline


def files_at(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files that a configuration names.

    Args:
        path: A file, a pattern such as ``'masks/*.tif'``, or several.

    Returns:
        The files, those of a pattern sorted.

    Raises:
        LabelError: If a pattern fits no file, or none is named.
    """
    names = [path] if isinstance(path, str | Path) else list(path)
    files: list[Path] = []
    for name in map(Path, names):
        if not name.exists() and any(character in str(name) for character in '*?['):
            root = Path(name.anchor)
            found = sorted(root.glob(str(name.relative_to(root))))
            if not found:
                raise LabelError(f'{name}: no file fits this pattern')
            files += found
        else:
            files.append(name)
    if not files:
        raise LabelError('labels: no file is named')
    return files
