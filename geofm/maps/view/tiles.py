"""Map tiles of a raster: an XYZ pyramid of PNG files in Web Mercator."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

import morecantile
import numpy as np
import numpy.typing as npt
import rasterio
from matplotlib import colormaps
from morecantile import Tile
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.warp import transform as transform_points
from rio_tiler import reader
from rio_tiler.expression import parse_expression
from rio_tiler.models import ImageData
from rio_tiler.utils import linear_rescale

from geofm import lonlat
from geofm.grid import Grid

# Tiles are not georeferenced: the page places them by their file names.
warnings.filterwarnings('ignore', category=NotGeoreferencedWarning, module=r'rasterio\.io')

Bytes = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Resampling = Literal['nearest', 'bilinear', 'average']

#: Tile matrix set of web maps: zoom z has 2^z x 2^z tiles of 256 x 256 px.
WEB_MERCATOR = morecantile.tms.get('WebMercatorQuad')
WEB_MERCATOR_CRS = CRS.from_epsg(3857)
TILE_SIZE = 256

#: Circumference of the globe in metres of Web Mercator.
WORLD = 2 * WEB_MERCATOR.xy_bbox.right

#: Minimum width in map pixels of a raster's pixel that is drawn as a square. Its edges are then
#: off by at most a sixteenth of its width.
_SHARPNESS = 8


@dataclass(frozen=True)
class RGB:
    """Three values as red, green and blue.

    Attributes:
        expression: Expression of rio-tiler, e.g. ``'b4;b3;b2'`` or ``'b1;b2;b1-b2'``.
        ranges: Values that become 0 and 255, for each channel.
        gamma: Exponent of the stretch. Below 1, it brightens the shadows.
        smooth: Whether to interpolate. False for values of patches.
        fill: Value of all bands where there is no data, if the file has no nodata value.
    """

    expression: str = 'b1;b2;b3'
    ranges: tuple[tuple[float, float], ...] = ((0, 255), (0, 255), (0, 255))
    gamma: float = 1
    smooth: bool = True
    fill: float | None = None

    @property
    def resampling(self) -> Resampling:
        """Bilinear if smooth; otherwise pixels stay squares, averaged if the map is coarser."""
        return 'bilinear' if self.smooth else 'average'

    def paint(self, values: np.ma.MaskedArray[Any, Any]) -> Bytes:
        """Stretch values to colours.

        Args:
            values: Values of shape (3, H, W).

        Returns:
            Red, green, blue and opacity, uint8 of shape (4, H, W). The colour of masked values
            is arbitrary.
        """
        bands = zip(values.data, self.ranges, strict=True)
        rgb = np.stack([_to_byte(_position(band, *limits) ** self.gamma) for band, limits in bands])
        return np.concatenate([rgb, np.full_like(rgb[:1], 255)])


@dataclass(frozen=True)
class Scalar:
    """One value, coloured by a colour map.

    Attributes:
        low: Value of the first colour.
        high: Value of the last colour.
        band: Band of the raster, from 1.
        colormap: Name of a colour map of matplotlib.
        unit: Name of the value, for the legend.
    """

    low: float
    high: float
    band: int = 1
    colormap: str = 'viridis'
    unit: str = ''
    resampling: Resampling = field(default='average', init=False)
    smooth: bool = field(default=False, init=False)

    @property
    def expression(self) -> str:
        """Expression of rio-tiler for the band."""
        return f'b{self.band}'

    def paint(self, values: np.ma.MaskedArray[Any, Any]) -> Bytes:
        """Look up values (1, H, W) in the colour map; return RGBA, uint8 (4, H, W)."""
        rgb = palette(self.colormap)[_to_byte(_position(values.data[0], self.low, self.high))]
        return np.concatenate([rgb.transpose(2, 0, 1), np.full_like(rgb[None, ..., 0], 255)])


@dataclass(frozen=True)
class Classes:
    """Classes, each with a colour.

    Attributes:
        colors: Red, green and blue of each class. Other values are not drawn.
        names: Names for the legend. A class without a name is called by its number.
        band: Band of the raster, from 1.
    """

    colors: Mapping[int, Colour]
    names: Mapping[int, str] = field(default_factory=dict)
    band: int = 1
    resampling: Resampling = field(default='nearest', init=False)
    smooth: bool = field(default=False, init=False)

    @property
    def expression(self) -> str:
        """Expression of rio-tiler for the band."""
        return f'b{self.band}'

    def paint(self, values: np.ma.MaskedArray[Any, Any]) -> Bytes:
        """Look up the colours of classes (1, H, W); return RGBA, uint8 (4, H, W)."""
        rgba = np.zeros((4, *values.shape[1:]), np.uint8)
        for value, color in self.colors.items():
            rgba[:, values.data[0] == value] = np.array([*color, 255], np.uint8)[:, None]
        return rgba


#: How values are drawn. All styles have the ``expression`` of rio-tiler that computes the values,
#: the method of GDAL for their ``resampling``, ``smooth``, which says whether they are interpolated
#: on screen or drawn as squares, and ``paint``.
Style = RGB | Scalar | Classes


def _position(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float64]:
    """Return the positions of values between two limits, in [0, 1]; 0 for NaN."""
    return np.nan_to_num(linear_rescale(values, (low, max(high, low + 1e-12)), (0, 1)))


def _to_byte(position: npt.NDArray[np.float64]) -> Bytes:
    """Convert 0 to 1 into 0 to 255 as rio-tiler does, by truncation in single precision."""
    return (position * 255).astype(np.float32).astype(np.uint8)


def palette(name: str) -> Bytes:
    """Return the colours of a colour map.

    Args:
        name: Name of a colour map of matplotlib.

    Returns:
        256 colours from low to high, uint8 of shape (256, 3).
    """
    return colormaps[name](np.arange(256), bytes=True)[:, :3]


def mercator_bounds(grid: Grid) -> tuple[float, float, float, float]:
    """Return the bounds of a grid in Web Mercator.

    Args:
        grid: The grid.

    Returns:
        Left, bottom, right and top in metres. Right is beyond the edge of the map if the grid
        crosses the antimeridian.

    Raises:
        ValueError: If a part of the grid lies outside the latitudes of Web Mercator.
    """
    points = lonlat.boundary(grid, 32)
    west, south, east, north = lonlat.extents(points[None])[0].tolist()
    lowest, highest = WEB_MERCATOR.bbox.bottom, WEB_MERCATOR.bbox.top
    if not (np.isfinite(points).all() and lowest <= south and north <= highest):
        raise ValueError(
            f'{grid.footprint().bounds} ({grid.crs}) is not on a web map, which covers 85.05° '
            f'south to 85.05° north'
        )
    _, (bottom, top) = transform_points(lonlat.LONLAT, WEB_MERCATOR_CRS, [0, 0], [south, north])
    return west / 360 * WORLD, bottom, east / 360 * WORLD, top


@dataclass(frozen=True)
class Pyramid:
    """The tiles that a raster covers.

    Attributes:
        bounds: Left, bottom, right and top in metres of Web Mercator. Right is beyond the edge of
            the map if the raster crosses the antimeridian.
        zooms: First and last zoom.
    """

    bounds: tuple[float, float, float, float]
    zooms: tuple[int, int]

    @classmethod
    def cover(
        cls,
        grid: Grid,
        smooth: bool = True,
        zooms: tuple[int, int] | None = None,
        max_zoom: int | None = None,
    ) -> Self:
        """Choose the zooms for a raster.

        Args:
            grid: Grid of the raster.
            smooth: Whether the raster is interpolated on the map. If so, the last zoom is the first
                at which a map pixel is not larger than a pixel of the raster. Otherwise it is the
                first at which a map pixel is not larger than an eighth of a pixel of the raster, so
                that the edges of pixels are accurate.
            zooms: First and last zoom. None: chosen by this rule.
            max_zoom: Maximum zoom that the rule may choose. None: no limit.

        Returns:
            The pyramid. At its first zoom, the raster is at most as large as one tile.

        Raises:
            ValueError: If the raster lies outside the latitudes of Web Mercator, or a zoom is out
                of range.
        """
        bounds = mercator_bounds(grid)
        if zooms is None:
            pixel = _pixel_on_map(grid) / (1 if smooth else _SHARPNESS)
            side = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
            last = WEB_MERCATOR.zoom_for_res(pixel, zoom_level_strategy='upper')
            last = last if max_zoom is None else min(last, max_zoom)
            first = WEB_MERCATOR.zoom_for_res(side / TILE_SIZE, zoom_level_strategy='lower')
            zooms = min(first, last), last
        if not 0 <= zooms[0] <= zooms[1] <= WEB_MERCATOR.maxzoom:
            raise ValueError(
                f'zooms={zooms}: give the first and the last, in 0..{WEB_MERCATOR.maxzoom}'
            )
        return cls(bounds, zooms)

    @property
    def tiles(self) -> Iterator[Tile]:
        """Tiles that intersect the bounds, zoom by zoom and column by column."""
        for zoom in range(self.zooms[0], self.zooms[1] + 1):
            first_x, first_y, last_x, last_y = self.ranges(zoom)
            for x in range(first_x, last_x + 1):
                for y in range(first_y, last_y + 1):
                    yield Tile(x % 2**zoom, y, zoom)

    def ranges(self, zoom: int) -> tuple[int, int, int, int]:
        """Return the range of tiles of a zoom.

        Args:
            zoom: The zoom.

        Returns:
            First column and row, last column and row. Across the antimeridian, columns continue
            with 2^zoom for the column at the western edge of the map.
        """
        left, bottom, right, top = self.bounds
        side = WORLD / 2**zoom
        # Shrunk slightly: bounds that end on the edge of a tile do not intersect the next tile.
        hair = 1e-6 * side / TILE_SIZE
        first_x, last_x = (int((x + WORLD / 2) // side) for x in (left + hair, right - hair))
        first_y, last_y = (int((WORLD / 2 - y) // side) for y in (top - hair, bottom + hair))
        return first_x, first_y, min(last_x, first_x + 2**zoom - 1), last_y


def _pixel_on_map(grid: Grid) -> float:
    """Return the shorter side of a grid's middle pixel in metres of Web Mercator."""
    col, row = grid.width / 2, grid.height / 2
    places = ((col, row), (col + 1, row), (col, row + 1))
    xs, ys = zip(*(grid.transform @ place for place in places), strict=True)
    xs, ys = transform_points(grid.crs, WEB_MERCATOR_CRS, xs, ys)
    xs = lonlat.near(xs, xs[0], WORLD).tolist()
    return min(math.hypot(xs[i] - xs[0], ys[i] - ys[0]) for i in (1, 2))


def read_tile(src: DatasetReader, style: Style, tile: Tile) -> ImageData:
    """Read and colour a tile.

    Args:
        src: The raster. Pixels have no data by its nodata value or mask, or if they are NaN.
        style: Style of the raster.
        tile: The tile.

    Returns:
        Red, green and blue, masked where there is no data.
    """
    image = reader.part(
        src,
        (*WEB_MERCATOR.xy_bounds(tile),),
        height=TILE_SIZE,
        width=TILE_SIZE,
        dst_crs=WEB_MERCATOR_CRS,
        bounds_crs=WEB_MERCATOR_CRS,
        indexes=parse_expression(style.expression),
        nodata=default_nodata(src, style),
        resampling_method=style.resampling,
        reproject_method=style.resampling,
        vrt_options=_longitudes_of(src),
    )
    values, hidden = evaluate(image, style)
    rgba = style.paint(values)
    hidden |= rgba[3] == 0
    rgb = np.where(hidden, np.uint8(0), rgba[:3])
    mask = np.broadcast_to(hidden, rgb.shape)
    return ImageData(np.ma.MaskedArray(rgb, mask), crs=image.crs, bounds=image.bounds)


def _longitudes_of(src: DatasetReader) -> dict[str, CRS]:
    """Return options of the warper for a raster whose longitudes exceed 180 degrees."""
    left, _, right, _ = src.bounds
    if not src.crs.is_geographic or max(abs(left), abs(right)) <= lonlat.CIRCLE / 2:
        return {}
    middle = (left + right) / 2
    return {'src_crs': CRS.from_proj4(f'{src.crs.to_proj4()} +lon_wrap={middle}')}


def default_nodata(src: DatasetReader, style: Style) -> float | None:
    """Return the nodata value to assume for a raster that states none, or None.

    It is the fill of the style, or NaN for floating-point values.
    """
    if src.nodata is not None:
        return None
    fill = style.fill if isinstance(style, RGB) else None
    floating = np.issubdtype(np.dtype(src.dtypes[0]), np.floating)
    return np.nan if fill is None and floating else fill


def evaluate(
    image: ImageData, style: Style
) -> tuple[np.ma.MaskedArray[Any, Any], npt.NDArray[np.bool_]]:
    """Return the values that a style draws, (C, H, W), and where they are hidden, (H, W).

    A pixel is hidden if any band is NaN or if all bands are nodata. A single band with nodata is
    not enough, because a dark pixel may be 0 in one band.
    """
    values = image.apply_expression(style.expression).array
    finite = np.isfinite(values.data).all(axis=0)
    return values, np.ma.getmaskarray(image.array).all(axis=0) | ~finite


def render_tiles(
    raster: Path, style: Style, pyramid: Pyramid, folder: Path
) -> Iterator[tuple[Tile, bool]]:
    """Write the tiles of a raster, on all cores.

    Args:
        raster: A raster that GDAL can read.
        style: Style of the raster.
        pyramid: Tiles to write.
        folder: Folder for ``<zoom>/<x>/<y>.png``. It is created if it does not exist.

    Yields:
        Each tile, and whether it was written. Tiles without data are not written.
    """

    def write_column(tiles: list[Tile]) -> list[tuple[Tile, bool]]:
        # A dataset must not be shared between threads.
        with rasterio.open(raster) as src:
            return [
                (tile, _write_tile(read_tile(src, style, tile), tile, folder)) for tile in tiles
            ]

    columns = [list(tiles) for _, tiles in groupby(pyramid.tiles, lambda tile: (tile.z, tile.x))]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for written in pool.map(write_column, columns):
            yield from written
    finally:
        pool.shutdown(cancel_futures=True)


def _write_tile(image: ImageData, tile: Tile, folder: Path) -> bool:
    if np.ma.getmaskarray(image.array).all():
        return False
    path = folder / str(tile.z) / str(tile.x) / f'{tile.y}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.render(img_format='PNG'))
    return True
