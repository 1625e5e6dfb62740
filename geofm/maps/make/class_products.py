"""Polygons of a raster of classes, and a picture with a legend."""

from pathlib import Path

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import rasterio
from matplotlib.patches import Patch
from rasterio.enums import Resampling
from rasterio.features import shapes
from shapely.geometry import shape

from geofm.atomic import atomic_file
from geofm.legend import NO_CLASS, Legend

#: Maximum side of a picture of classes in pixels of the raster.
_MOST_SIDE = 1400

#: Maximum number of characters of a name in a legend.
_MOST_NAME = 60


def write_polygons(classes: Path, path: Path, legend: Legend, simplify: float = 0.0) -> None:
    """Write the areas of a raster of classes as polygons.

    Args:
        classes: Raster of uint8 with :data:`~geofm.legend.NO_CLASS` where there is no class.
        path: GeoParquet file to write, with the columns ``value``, ``class`` and ``geometry``: one
            polygon per connected area, in the CRS of the raster.
        legend: The classes.
        simplify: Tolerance of the simplification of outlines in units of the CRS. 0: they are not
            simplified.
    """
    with rasterio.open(classes) as src:
        values, crs, transform = src.read(1), src.crs, src.transform
    found = list(shapes(values, mask=values != NO_CLASS, transform=transform))
    numbers = [int(value) for _, value in found]
    frame = gpd.GeoDataFrame(
        {'value': numbers, 'class': [legend.name(value) for value in numbers]},
        geometry=[shape(outline) for outline, _ in found],
        crs=crs,
    )
    if simplify > 0:
        frame.geometry = frame.geometry.simplify(simplify)
        frame = frame[~frame.geometry.is_empty]
    with atomic_file(path) as part:
        frame.to_parquet(part)


def draw_classes(classes: Path, path: Path, legend: Legend) -> None:
    """Draw a raster of classes with its legend.

    Args:
        classes: Raster of uint8 with :data:`~geofm.legend.NO_CLASS` where there is no class.
        path: PNG file to write.
        legend: The classes. Classes that occur are listed with the percentage of their area.
    """
    with rasterio.open(classes) as src:
        shrink = max(1.0, max(src.shape) / _MOST_SIDE)
        size = tuple(max(1, round(side / shrink)) for side in src.shape)
        values = src.read(1, out_shape=size, resampling=Resampling.nearest)
    colors = np.full((256, 3), 255, np.uint8)
    for value, color in legend.colors.items():
        colors[value] = color
    counts = np.bincount(values.ravel(), minlength=256)[:NO_CLASS]
    fractions = counts / max(1, int(counts.sum()))
    height, width = values.shape
    side = 7.0 / max(height, width)
    figure, axes = plt.subplots(figsize=(max(1.5, side * width) + 2.6, max(2.0, side * height)))
    axes.imshow(colors[values], interpolation='nearest')
    axes.set_axis_off()
    shown = [c for c in legend.classes if counts[c.value]]
    handles = [
        Patch(facecolor='#{:02x}{:02x}{:02x}'.format(*c.color), edgecolor='0.4') for c in shown
    ]
    key = axes.legend(
        handles, [' '] * len(shown), loc='upper left', bbox_to_anchor=(1.01, 1), frameon=False
    )
    for text, c in zip(key.get_texts(), shown, strict=True):
        # Set afterwards, because matplotlib omits labels that start with an underscore.
        text.set_parse_math(False)
        text.set_text(f'{_shortened(c.name)}  {100 * fractions[c.value]:.1f} %')
    try:
        with atomic_file(path) as part:
            figure.savefig(part, format='png', dpi=150, bbox_inches='tight')
    finally:
        plt.close(figure)


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_NAME else f'{name[: _MOST_NAME - 3]}...'
