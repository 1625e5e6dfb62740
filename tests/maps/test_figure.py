from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.maps.make.windows import Strip
from geofm.maps.make.writer import Encoding, write_patches
from geofm.maps.view.figure import north, plot_products, save_figure

from .scenes import NORTH_UP, UTM, noise, write

CMAP = colormaps['plasma']
HEADS = {'s1': 3, 's2': 3, 'fusion': 4}


def _titles(figure: Figure) -> list[str]:
    return [title for ax in figure.get_axes() if (title := ax.get_title())]


def _attention_names(heads: dict[str, int]) -> list[str]:
    return [
        f'{source} {"last layer" if source == "fusion" else "block 1"} {what}'
        for source, count in heads.items()
        for what in ('mean', *(f'head {head}' for head in range(count)))
    ]


def _files(folder: Path, grid: Grid, heads: dict[str, int], p: int = 8) -> dict[str, Path]:
    """Products with high values in the south-west quarter and one patch without data."""
    rows, cols = -(-grid.height // p), -(-grid.width // p)
    valid = np.ones((rows * p, cols * p), bool)
    valid[:p, :p] = False
    kinds: dict[str, tuple[list[str], Encoding]] = {
        'attention': (_attention_names(heads), Encoding()),
        'rollout': ([f'{source} rollout' for source in heads if source != 'fusion'], Encoding()),
        'point': (_attention_names({'s2': 2}), Encoding()),
        'pca': (['r', 'g', 'b'], Encoding('uint8', 0, rgb=True)),
        'segments': (['segment'], Encoding('uint8', 255, colors={0: (9, 9, 9), 1: (255, 0, 0)})),
        'foreground': (['f'], Encoding('uint8', 255, colors={0: (9, 9, 9), 1: (255, 0, 0)})),
    }
    files = {}
    for product, (names, encoding) in kinds.items():
        values = np.zeros((len(names), rows, cols), np.float32) + (product == 'pca')
        values[:, rows // 2 :, : cols // 2] = 200 if product == 'pca' else 1
        files[product] = folder / f's2_{product}.tif'
        write_patches(files[product], grid, p, names, [Strip(values, valid)], encoding=encoding)
    return files


def _plot(
    folder: Path,
    transform: Affine = NORTH_UP,
    crs: CRS = UTM,
    heads: dict[str, int] = HEADS,
    shape: tuple[int, int] = (48, 64),
    **kwargs: Any,
) -> Figure:
    s1 = write(folder / 's1.tif', noise('s1', *shape), crs, transform)
    s2 = write(folder / 's2.tif', noise('s2', *shape), crs, transform)
    files = _files(folder, Grid(crs, transform, *shape), heads)
    return plot_products(files, s1, s2, max_side=40, **kwargs)


def test_every_product_and_head_has_a_panel(tmp_path: Path) -> None:
    titles = _titles(_plot(tmp_path))
    assert titles[:5] == [
        'Sentinel-2 true colour',
        'Sentinel-1 VV, VH, VV/VH',
        'PCA of patch tokens',
        'Segments',
        'Foreground',
    ]
    layers = {'Sentinel-1': 'block 1', 'Sentinel-2': 'block 1', 'Cross-attention': 'last layer'}
    for (name, where), count in zip(layers.items(), HEADS.values(), strict=True):
        assert f'{name}, {where}: mean' in titles
        assert sum(title.startswith(f'{name}: head') for title in titles) == count
    assert titles[-3:] == [
        'Sentinel-1: rollout',
        'Sentinel-2: rollout',
        'Sentinel-2: from one patch',
    ]


def test_one_sensor_and_some_products(tmp_path: Path) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 48, 64))
    files = _files(tmp_path, Grid(UTM, NORTH_UP, 48, 64), {'s2': 2})
    figure = plot_products({'pca': files['pca']}, None, s2, title='A title')
    assert _titles(figure) == ['Sentinel-2 true colour', 'PCA of patch tokens']
    assert figure.get_suptitle() == 'A title'
    assert plot_products({}, None, s2).get_suptitle() == 's2'
    with pytest.raises(ValueError, match='--s1, --s2 or both'):
        plot_products(files)


def test_change_has_a_panel_with_its_own_scale(tmp_path: Path) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 48, 64))
    grid, values = Grid(UTM, NORTH_UP, 48, 64), np.full((1, 6, 8), 0.25, np.float32)
    values[:, 3:, :4] = 0.75
    tags = {'before_date': '2019-05-01, 2019-05-03', 'after_date': '2021-05-03'}
    path = tmp_path / 's2_change.tif'
    valid = np.ones(grid.shape, bool)
    write_patches(path, grid, 8, ['cosine distance'], [Strip(values, valid)], tags)
    figure = plot_products({'change': path}, None, s2)
    title = 'Change, 2019-05-01 to 2021-05-03'
    assert _titles(figure) == ['Sentinel-2 true colour', title]
    (ax,) = (ax for ax in figure.get_axes() if ax.get_title() == title)
    np.testing.assert_allclose(ax.get_images()[0].get_clim(), (0, 0.75))
    drawn = _pixels(figure, title)
    np.testing.assert_allclose(drawn[-4, 4], 255 * np.array(CMAP(1.0)[:3]), atol=1)
    np.testing.assert_allclose(drawn[4, -4], 255 * np.array(CMAP(1 / 3)[:3]), atol=1)
    assert figure.get_axes()[-1].get_ylabel() == 'cosine distance'


def test_attention_rows_start_with_a_picture(tmp_path: Path) -> None:
    """Each row begins with a picture of the attended sensor, and is full."""
    pair = [write(tmp_path / f'{key}.tif', noise(key, 48, 64)) for key in ('s1', 's2')]
    files = _files(tmp_path, Grid(UTM, NORTH_UP, 48, 64), {'s1': 3, 's2': 3})
    figure = plot_products({'attention': files['attention']}, *pair)
    assert figure.get_suptitle() == 's2: CLS attention'
    titles = _titles(figure)
    assert titles[0] == 'Sentinel-1 VV, VH, VV/VH'
    assert titles[5] == 'Sentinel-2 true colour'
    assert len(titles) == 10
    panels = sum(ax.get_position().width * ax.get_position().height for ax in figure.get_axes())
    assert panels > 0.7


def test_many_heads_take_several_rows(tmp_path: Path) -> None:
    figure = _plot(tmp_path, heads={'s1': 16})
    assert sum('head ' in title for title in _titles(figure)) == 16
    width, _ = figure.get_size_inches()
    assert width < 25


def test_panels_do_not_overlap(tmp_path: Path) -> None:
    figure = _plot(tmp_path)
    FigureCanvasAgg(figure).draw()
    boxes = [ax.get_window_extent() for ax in figure.get_axes()]
    for i, box in enumerate(boxes):
        assert figure.bbox.fully_contains(box.x0, box.y0)
        assert figure.bbox.fully_contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_heads_of_a_source_share_a_colour_scale(tmp_path: Path) -> None:
    figure = _plot(tmp_path)
    limits = {
        image.get_clim()
        for ax in figure.get_axes()
        if ax.get_title().startswith('Sentinel-1: head')
        for image in ax.get_images()
    }
    assert limits == {(0, 1)}


def _pixels(figure: Figure, title: str) -> np.ndarray:
    """Colours of a panel as drawn, (rows, columns, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]
    (ax,) = (ax for ax in figure.get_axes() if ax.get_title() == title)
    box = ax.get_window_extent()
    top, bottom = (round(len(drawn) - y) for y in (box.y1, box.y0))
    return drawn[top:bottom, round(box.x0) : round(box.x1)]


@pytest.mark.parametrize('shape', [(48, 64), (44, 61)])
@pytest.mark.parametrize('title', ['Sentinel-1: head 1', 'Segments', 'Foreground'])
def test_products_are_drawn_at_their_place(
    tmp_path: Path, shape: tuple[int, int], title: str
) -> None:
    """The south-west quarter has high values, and the last patches are cropped to the scene."""
    drawn = _pixels(_plot(tmp_path, shape=shape), title).astype(int)
    height, width = drawn.shape[:2]
    edge_row, edge_col = round(height * 24 / shape[0]), round(width * 32 / shape[1])
    high, low = drawn[-4, 4], drawn[4, -4]
    assert np.abs(high - low).sum() > 100
    for row, col, expected in (
        (edge_row + 3, edge_col - 4, high),
        (edge_row - 4, edge_col - 4, low),
        (edge_row + 3, edge_col + 3, low),
    ):
        np.testing.assert_array_equal(drawn[row, col], expected)


def test_a_south_up_scene_is_drawn_upright(tmp_path: Path) -> None:
    """Rows run northwards, so the first row is at the bottom and has no high values."""
    drawn = _pixels(_plot(tmp_path, Affine(10, 0, 5e5, 0, 10, 4e6)), 'Segments')
    assert drawn[4, 4].tolist() == [255, 0, 0]
    assert drawn[-30, -4].tolist() == [9, 9, 9]


def test_large_scenes_are_drawn_small(tmp_path: Path) -> None:
    figure = _plot(tmp_path)
    (ax,) = (ax for ax in figure.get_axes() if ax.get_title() == 'Sentinel-2 true colour')
    assert ax.get_images()[0].get_array().shape[:2] == (30, 40)  # type: ignore[union-attr]


def test_pixels_have_the_aspect_ratio_of_the_ground(tmp_path: Path) -> None:
    """At 60 degrees north, a degree of longitude is half as long as a degree of latitude."""
    transform = Affine(1e-4, 0, 20, 0, -1e-4, 60)
    ax = _plot(tmp_path, transform, CRS.from_epsg(4326)).get_axes()[0]
    assert ax.get_aspect() == pytest.approx(2, rel=1e-3)
    assert _plot(tmp_path).get_axes()[0].get_aspect() == 1


@pytest.mark.parametrize(('metres', 'label'), [(10, '100 m'), (100, '1 km'), (250, '2 km')])
def test_the_scale_bar_is_as_long_as_it_says(tmp_path: Path, metres: int, label: str) -> None:
    transform = Affine(metres, 0, 5e5, 0, -metres, 4e6)
    ax = _plot(tmp_path, transform).get_axes()[0]
    assert [text.get_text() for text in ax.texts] == [label, 'N']
    start, end = np.asarray(ax.lines[0].get_xdata(), float)
    length = float(label.split()[0]) * (1000 if label.endswith('km') else 1)
    assert end - start == pytest.approx(length / (64 * metres))


@pytest.mark.parametrize(
    ('transform', 'expected'),
    [
        (NORTH_UP, (0, 1)),
        (Affine(10, 0, 5e5, 0, 10, 4e6), (0, 1)),
        # Columns run northwards and rows eastwards, so north is to the right.
        (Affine(0, 10, 5e5, 10, 0, 4e6), (1, 0)),
        (NORTH_UP @ Affine.rotation(-30), (0.5, 3**0.5 / 2)),
    ],
)
def test_the_arrow_points_north(transform: Affine, expected: tuple[float, float]) -> None:
    grid = Grid(UTM, transform, 10, 10)
    assert north(grid) == pytest.approx(expected, abs=1e-9)
    # A point north of another lies in this direction in the picture.
    x, y = transform @ (5, 5)
    row, col = grid.pixel_of(x, y + 10)
    up = 1 if transform.e > 0 else -1
    assert ((col - 5), up * (row - 5)) == pytest.approx(expected, abs=1e-6)


def test_the_figure_is_written(tmp_path: Path) -> None:
    png, pdf = save_figure(_plot(tmp_path), tmp_path / 'new' / 'a.b')
    assert (png.name, pdf.name) == ('a.b.png', 'a.b.pdf')
    assert png.read_bytes()[:4] == b'\x89PNG'
    assert pdf.read_bytes()[:4] == b'%PDF'
    assert png.stat().st_size > 10_000
