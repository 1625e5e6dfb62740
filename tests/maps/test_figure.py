from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.maps.figure import plot_attention
from geofm.maps.scene import Scene
from geofm.sensors import BANDS, SENTINEL1

from .scenes import NORTH_UP, UTM, noise, write

HEADS = {'s1': 3, 's2': 3, 'fusion': 4}


def _titles(figure: Figure) -> list[str]:
    return [title for ax in figure.get_axes() if (title := ax.get_title())]


def _plot(
    folder: Path,
    transform: Affine = NORTH_UP,
    crs: CRS = UTM,
    bands: tuple[str, ...] = BANDS,
    heads: dict[str, int] = HEADS,
    shape: tuple[int, int] = (48, 64),
) -> Figure:
    """A picture of a scene whose south-west corner has high attention, and one corner no data."""
    s1 = write(folder / 's1.tif', noise('s1', *shape), crs, transform)
    s2 = write(folder / 's2.tif', noise('s2', *shape), crs, transform)
    values = np.zeros((sum(heads.values()) + len(heads), *shape), np.float32)
    values[:, shape[0] // 2 :, : shape[1] // 2] = 1
    values[:, :8, :8] = np.nan
    raster = write(folder / 'attention.tif', values, crs, transform)
    with Scene(bands, s1, s2) as scene:
        return plot_attention(scene, raster, heads, 'title', max_side=40)


def test_every_source_and_head_has_a_panel(tmp_path: Path) -> None:
    titles = _titles(_plot(tmp_path))
    assert titles.count('Sentinel-2 true colour') == 2  # for Sentinel-2 and for cross-attention
    assert titles.count('Sentinel-1 VV, VH, VV/VH') == 1
    for name, count in (('Sentinel-1', 3), ('Sentinel-2', 3), ('Cross-attention', 4)):
        assert f'{name}: mean of heads' in titles
        assert sum(title.startswith(f'{name}: head') for title in titles) == count


def test_many_heads_take_several_lines(tmp_path: Path) -> None:
    figure = _plot(tmp_path, bands=SENTINEL1.band_names, heads={'s1': 16})
    assert sum('head ' in title for title in _titles(figure)) == 16
    width, _ = figure.get_size_inches()
    assert width < 25


def test_heads_of_a_source_share_a_colour_scale(tmp_path: Path) -> None:
    figure = _plot(tmp_path)
    limits = {
        image.get_clim()
        for ax in figure.get_axes()
        if ax.get_title().startswith('Sentinel-1: head')
        for image in ax.get_images()
    }
    assert limits == {(0, 1)}


def test_large_scenes_are_drawn_small(tmp_path: Path) -> None:
    figure = _plot(tmp_path)
    shapes = {
        image.get_array().shape[:2]  # type: ignore[union-attr]
        for ax in figure.get_axes()
        if ax.get_title()
        for image in ax.get_images()
    }
    assert shapes == {(30, 40)}


def test_the_ground_has_its_proportions(tmp_path: Path) -> None:
    """At 60 degrees north a degree of longitude is half as long as one of latitude."""
    transform = Affine(1e-4, 0, 20, 0, -1e-4, 60)
    ax = _plot(tmp_path, transform, CRS.from_epsg(4326)).get_axes()[0]
    assert ax.get_aspect() == pytest.approx(2, rel=1e-3)
    assert _plot(tmp_path).get_axes()[0].get_aspect() == 1


def test_a_raster_stored_from_south_to_north_is_drawn_upright(tmp_path: Path) -> None:
    for transform, upright in ((NORTH_UP, False), (Affine(10, 0, 5e5, 0, 10, 4e6), True)):
        ax = _plot(tmp_path, transform).get_axes()[0]
        bottom, top = ax.get_ylim()
        assert (bottom < top) == upright


@pytest.mark.parametrize(('metres', 'label'), [(10, '100 m'), (100, '1 km'), (250, '2 km')])
def test_the_scale_bar_is_as_long_as_it_says(tmp_path: Path, metres: int, label: str) -> None:
    transform = Affine(metres, 0, 5e5, 0, -metres, 4e6)
    ax = _plot(tmp_path, transform).get_axes()[0]
    assert [text.get_text() for text in ax.texts] == [label]
    start, end = np.asarray(ax.lines[0].get_xdata(), float)
    length = float(label.split()[0]) * (1000 if label.endswith('km') else 1)
    assert end - start == pytest.approx(length / (64 * metres))


def test_the_figure_is_written(tmp_path: Path) -> None:
    path = tmp_path / 'figure.png'
    _plot(tmp_path).savefig(path)
    assert path.stat().st_size > 10_000
