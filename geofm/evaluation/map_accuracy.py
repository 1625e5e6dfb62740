"""Accuracy of maps of classes compared with a reference raster or reference features."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import rasterio
from rasterio.windows import Window

from geofm.datasets.labels import LabelSource
from geofm.evaluation.accuracy import Accuracy, Confusions
from geofm.grid import Grid
from geofm.legend import Legend, LegendError

#: Number of rows of a map that are compared at once.
_ROWS = 512


def assess_maps(
    sources: Mapping[Path, LabelSource], reference: str, block: int = 64, seed: int = 0
) -> Accuracy:
    """Compare maps of classes with references, pooling their pixels.

    Maps on the same grid, such as the dates of a place, share their blocks.

    Args:
        sources: The reference of each map. All maps must have the same classes.
        reference: Name of the references in messages.
        block: Side of the blocks of the spatial bootstrap, in pixels of the maps.
        seed: Seed of the bootstrap.

    Returns:
        The accuracy.

    Raises:
        ValueError: If there is no map, if the first map has no legend, if a reference cannot be
            used, or if no reference has a label on its map.
    """
    if not sources:
        raise ValueError(f'{reference}: there is no map to compare it with')
    confusions = Confusions(legend_of(next(iter(sources))), block)
    grids: dict[tuple[object, ...], int] = {}
    try:
        for classes, source in sources.items():
            with rasterio.open(classes) as src:
                grid = Grid.of(src)
                scene = grids.setdefault((str(grid.crs), *grid.transform), len(grids))
                for row, window in _rows(grid):
                    truth = source.classes_on(grid.crop(row, 0, int(window.height), grid.width))
                    confusions.add(src.read(1, window=window), truth, row, scene=scene)
        return confusions.accuracy(seed=seed)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if reference in text else f'{reference}: {text}') from error


def legend_of(classes: Path) -> Legend:
    """Read the legend of a map.

    Args:
        classes: Raster of classes with a legend in its tags.

    Returns:
        The legend.

    Raises:
        ValueError: If the map has no legend.
    """
    with rasterio.open(classes) as src:
        try:
            legend = Legend.from_tags(src.tags())
        except LegendError as error:
            raise ValueError(f'{classes}: {error}') from error
    if legend is None:
        raise ValueError(
            f'{classes}: no legend in its tags; give a *_classes.tif written by `geofm predict`'
        )
    return legend


def _rows(grid: Grid) -> Iterator[tuple[int, Window]]:
    for row in range(0, grid.height, _ROWS):
        yield row, Window(0, row, grid.width, min(_ROWS, grid.height - row))
