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
