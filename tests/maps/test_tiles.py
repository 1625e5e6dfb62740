"""Map tiles show the raster at its place, and equal those of rio-tiler."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from matplotlib import colormaps
from morecantile import Tile
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from geofm.grid import Grid
from tests.maps.scenes import NORTH_UP, UTM, write

pytest.importorskip('rio_tiler', reason='map tiles need rio-tiler, of the extra "maps"')

from rio_tiler.io import Reader

from geofm.maps.view.page import Layer, write_page
from geofm.maps.view.tiles import (
    RGB,
    WEB_MERCATOR,
    Classes,
    Pyramid,
    Scalar,
    Style,
    palette,
    render_tiles,
)

# PNG files are not georeferenced: their name determines their place.
pytestmark = pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')

DEGREES = CRS.from_epsg(4326)
GRIDS = {
    'utm': (UTM, NORTH_UP),
    'degrees': (DEGREES, Affine(9e-5, 0, -3, 0, -9e-5, 38)),
    'south-up': (UTM, Affine(10, 0, 500_000, 0, 10, 4_199_000)),
    'rotated': (UTM, NORTH_UP @ Affine.rotation(30)),
    # Across the antimeridian.
    'fiji': (CRS.from_epsg(32760), Affine(10, 0, 820_000, 0, -10, 8_173_600)),
    'fiji, zone 1': (CRS.from_epsg(32701), Affine(10, 0, 179_300, 0, -10, 8_173_600)),
    'degrees east': (DEGREES, Affine(9e-5, 0, 179.9965, 0, -9e-5, -16.5)),
    'degrees west': (DEGREES, Affine(9e-5, 0, -180.0035, 0, -9e-5, -16.5)),
}


def write_tiles(
    raster: Path, style: Style, output: Path, zooms: tuple[int, int] | None = None
) -> set[Tile]:
    """Write a pyramid, and return the tiles that were written."""
    with rasterio.open(raster) as src:
        pyramid = Pyramid.cover(Grid.of(src), style.smooth, zooms)
    return {tile for tile, written in render_tiles(raster, style, pyramid, output) if written}


def read_png(path: Path) -> npt.NDArray[np.uint8]:
    with rasterio.open(path) as src:
        pixels: npt.NDArray[np.uint8] = src.read()
    return pixels


def place_of_pixels(grid: Grid, tile: Tile) -> tuple[npt.NDArray[np.float64], ...]:
    """Fractional row and column of the raster at each pixel of a tile, each (256, 256)."""
    left, bottom, right, top = WEB_MERCATOR.xy_bounds(tile)
    at = (np.arange(256) + 0.5) / 256
    x, y = np.meshgrid(left + at * (right - left), top + at * (bottom - top))
    to_grid = Transformer.from_crs(3857, grid.crs, always_xy=True)
    xs, ys = to_grid.transform(x, y)
    if grid.crs == DEGREES:
        west = grid.transform.c
        xs = np.where(xs < west - 180, xs + 360, np.where(xs > west + 180, xs - 360, xs))
    return grid.pixel_of(xs, ys)


@pytest.mark.parametrize('name', GRIDS)
def test_tiles_lie_on_the_ground(tmp_path: Path, name: str) -> None:
    """Brute force with pyproj: each pixel of a tile has the class of its raster pixel."""
    crs, transform = GRIDS[name]
    classes = np.arange(12 * 9, dtype=np.uint8).reshape(1, 12, 9)
    raster = write(tmp_path / 'a.tif', classes, crs, transform @ Affine.scale(8), nodata=0)
    colors = {int(v): (int(v), 255 - int(v), 7) for v in classes.ravel()}
    tiles = write_tiles(raster, Classes(colors), tmp_path / 'tiles')
    with rasterio.open(raster) as src:
        grid = Grid.of(src)
    last = max(tile.z for tile in tiles)
    assert all(0 <= tile.x < 2**tile.z and 0 <= tile.y < 2**tile.z for tile in tiles)
    assert len(tiles) < 600
    seen = np.zeros(classes.size, int)
    for tile in tiles:
        rgba = read_png(tmp_path / 'tiles' / f'{tile.z}/{tile.x}/{tile.y}.png')
        rows, cols = place_of_pixels(grid, tile)
        inside = (rows >= 0) & (cols >= 0) & (rows < 12) & (cols < 9)
        wanted = np.zeros((256, 256), int)
        wanted[inside] = classes[0, rows[inside].astype(int), cols[inside].astype(int)]
        shown = np.where(rgba[3] == 255, rgba[0], 0)
        # GDAL's warper approximates to an eighth of a map pixel.
        edge = 1e-3 if tile.z < last else 5e-3
        edge += 0.125 * np.abs(np.diff(rows, axis=0)).max()
        sure = np.minimum(abs(rows - np.rint(rows)), abs(cols - np.rint(cols))) > edge
        np.testing.assert_array_equal(shown[sure], wanted[sure])
        np.testing.assert_array_equal(rgba[1][rgba[3] > 0], 255 - rgba[0][rgba[3] > 0])
        if tile.z == last:
            seen += np.bincount(shown.ravel(), minlength=classes.size)
    assert (seen[1:] >= 49).all(), 'at the last zoom, a raster pixel is at least 8 map pixels wide'


def reference(raster: Path, style: Style, tile: Tile) -> npt.NDArray[np.uint8]:
    """RGBA rendered by rio-tiler alone."""
    with Reader(str(raster)) as src:
        image = src.tile(
            *tile,
            expression=style.expression,
            resampling_method=style.resampling,
            reproject_method=style.resampling,
        )
    colormap = None
    if isinstance(style, RGB):
        image.rescale(style.ranges)
    elif isinstance(style, Scalar):
        image.rescale([(style.low, style.high)])
        colormap = {i: (*map(int, color), 255) for i, color in enumerate(palette(style.colormap))}
    else:
        colormap = {value: (*color, 255) for value, color in style.colors.items()}
    with MemoryFile(image.render(img_format='PNG', colormap=colormap)) as file, file.open() as src:
        pixels: npt.NDArray[np.uint8] = src.read()
    return pixels


STYLES: dict[str, Style] = {
    'rgb': RGB('b3;b2;b1', ((0, 4000), (100, 3000), (0, 2500))),
    'patches': RGB('b1;b2;b3', ((0, 4000),) * 3, smooth=False),
    'scalar': Scalar(-50, 3500, band=2),
    'classes': Classes({v: (v % 251, v % 13, v % 29) for v in range(500, 1000)}),
}


@pytest.mark.parametrize('name', STYLES)
@pytest.mark.parametrize('crs', ['utm', 'degrees'])
def test_tiles_are_what_rio_tiler_renders(tmp_path: Path, name: str, crs: str) -> None:
    style = STYLES[name]
    pixels = np.random.default_rng(0).uniform(0, 4000, (3, 70, 90)).astype(np.float32)
    if name == 'classes':
        pixels = np.rint(pixels)
    pixels[:, 20:40, 30:60] = np.nan
    raster = write(tmp_path / 'a.tif', pixels, *GRIDS[crs], nodata=np.nan)
    tiles = write_tiles(raster, style, tmp_path / 'tiles', (12, 16))
    assert len(tiles) > 4
    for tile in tiles:
        shown = read_png(tmp_path / 'tiles' / f'{tile.z}/{tile.x}/{tile.y}.png')
        wanted = reference(raster, style, tile)
        np.testing.assert_array_equal(shown[3], wanted[3])
        seen = wanted[3] > 0
        np.testing.assert_array_equal(shown[:3, seen], wanted[:3, seen])


def test_tiles_without_data_are_not_written(tmp_path: Path) -> None:
    pixels = np.full((1, 400, 400), np.nan, np.float32)
    pixels[0, :20, :20] = pixels[0, -20:, -20:] = 1
    raster = write(tmp_path / 'a.tif', pixels, nodata=np.nan)
    style = Scalar(0, 1)
    tiles = write_tiles(raster, style, tmp_path / 'tiles', (13, 16))
    files = {
        Tile(int(path.parent.name), int(path.stem), int(path.parent.parent.name))
        for path in (tmp_path / 'tiles').rglob('*.png')
    }
    assert files == tiles
    with rasterio.open(raster) as src:
        planned = {*Pyramid.cover(Grid.of(src), zooms=(13, 16)).tiles}
    assert len(tiles) < len(planned)
    for tile in planned:
        assert (reference(raster, style, tile)[3].max() > 0) == (tile in tiles)


def test_zooms_follow_the_pixel_size() -> None:
    grid = Grid(UTM, NORTH_UP, 2048, 2048)
    first, last = Pyramid.cover(grid).zooms
    # A map pixel at the equator is 156,543 m / 2^zoom; here, at 38° north, 1 / cos(38°) smaller.
    ground = 156_543.03 / 2**last * np.cos(np.radians(37.9))
    assert 5 < ground <= 10
    assert 2048 * 10 / (156_543.03 / 2**first * np.cos(np.radians(37.9))) <= 256
    patches = grid.coarsen(16)
    assert Pyramid.cover(patches, smooth=False).zooms == (first, last - 1)
    assert Pyramid.cover(patches, smooth=False, max_zoom=10).zooms[1] == 10
    assert Pyramid.cover(grid, zooms=(3, 5)).zooms == (3, 5)
    with pytest.raises(ValueError, match='zooms'):
        Pyramid.cover(grid, zooms=(5, 3))


def test_rasters_near_a_pole_are_an_error() -> None:
    with pytest.raises(ValueError, match='85'):
        Pyramid.cover(Grid(DEGREES, Affine(0.1, 0, 0, 0, -0.1, 89), 20, 20))


def test_a_folder_is_replaced_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raster = write(tmp_path / 'a.tif', np.ones((1, 64, 64), np.float32))
    output = tmp_path / 'page'

    def write_zooms(*zooms: int) -> None:
        layer = Layer('a', raster, Scalar(0, 1), 'Group')
        write_page(output, [layer], title='Page', zooms=(zooms[0], zooms[-1]))

    def written() -> set[str]:
        return {path.name for path in output.glob('tiles/*/*')}

    write_zooms(15, 16)
    assert written() == {'15', '16'}
    write_zooms(14, 15)
    assert written() == {'14', '15'}

    def fail(*args: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(Scalar, 'paint', fail)
    with pytest.raises(OSError, match='disk full'):
        write_zooms(15, 16)
    assert written() == {'14', '15'}
    assert {p.name for p in tmp_path.iterdir()} == {'a.tif', 'page'}


def test_fill_is_no_data_only_where_all_bands_have_it(tmp_path: Path) -> None:
    pixels = np.full((3, 64, 64), 2000, np.uint16)
    pixels[:, :, :32] = 0
    pixels[0, 40:, 40:] = 0
    raster = write(tmp_path / 'a.tif', pixels)
    style = RGB(ranges=((0, 4000),) * 3, fill=0)
    (tile,) = write_tiles(raster, style, tmp_path / 'tiles', (12, 12))
    rgba = read_png(tmp_path / f'tiles/12/{tile.x}/{tile.y}.png')
    with rasterio.open(raster) as src:
        _, cols = place_of_pixels(Grid.of(src), tile)
    rows, _ = place_of_pixels(Grid(UTM, NORTH_UP, 64, 64), tile)
    within = (cols > 1) & (rows > 1) & (rows < 63)
    assert (rgba[3][within & (cols < 30)] == 0).all()
    assert (rgba[3][within & (cols > 34) & (cols < 63)] == 255).all()
    assert (rgba[0][within & (cols > 44) & (cols < 63) & (rows > 44)] == 0).all()


def test_the_palette_equals_matplotlib() -> None:
    wanted = [[round(255 * c) for c in colormaps['viridis'](i)[:3]] for i in (0, 100, 255)]
    np.testing.assert_allclose(palette('viridis')[[0, 100, 255]], wanted, atol=1)
