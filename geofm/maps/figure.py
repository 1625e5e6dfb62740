"""Pictures of attention over a scene."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from geofm.grid import Grid
from geofm.maps.scene import Scene
from geofm.sensors import RGB_BANDS, SENSORS

Array = npt.NDArray[np.float32]

# Perceptually uniform, readable with any colour vision, and never black, so that the ground shows
# through it.
_CMAP = colormaps['plasma']
_NO_DATA = '0.82'
_MOST_COLUMNS = 8
_PANEL_INCHES = 2.4


def plot_attention(
    scene: Scene, raster: Path, heads: Mapping[str, int], title: str, max_side: int = 640
) -> Figure:
    """Draw, for each source of attention, the scene, the mean over it, and every head.

    Args:
        scene: The scene.
        raster: Attention on the grid of the scene; for each source the mean, then its heads.
        heads: Number of heads of each source, in the order of the raster.
        title: Title of the figure.
        max_side: Longest side of a panel in pixels; larger scenes are read at this size.

    Returns:
        The figure. It belongs to no window, and is safe to make in any thread.
    """
    pictures = _pictures(scene, max_side)
    backdrop = pictures.get('s2') or pictures['s1']
    # Cross-attention has no sensor of its own.
    picture_of = {source: pictures.get(source, backdrop) for source in heads}
    attention = _read_attention(raster, heads, backdrop.rgba.shape[:2])

    most = 2 + max(heads.values())
    columns = math.ceil(most / math.ceil(most / _MOST_COLUMNS))
    lines = [math.ceil((2 + count) / columns) for count in heads.values()]
    panel = _PANEL_INCHES * _aspect(scene.grid) * scene.grid.height / scene.grid.width
    panel = min(max(panel, 0.4 * _PANEL_INCHES), 2.5 * _PANEL_INCHES)
    size = (columns * _PANEL_INCHES + 0.8, sum(lines) * (panel + 0.3) + 0.4)
    figure = Figure(size, dpi=130, layout='constrained')
    figure.suptitle(title, fontsize=10)
    parts = figure.subfigures(len(heads), 1, squeeze=False, height_ratios=lines)[:, 0]

    for part, n, (source, maps) in zip(parts, lines, attention.items(), strict=True):
        axes = _panels(part, n, columns)
        picture, norm = picture_of[source], _limits(maps)
        _show(axes[0], picture.rgba, picture.title, scene.grid)
        _scale_bar(axes[0], scene.grid)
        drape = _drape(maps[0], picture.rgba, norm)
        _show(axes[1], drape, f'{_title(source)}: mean of heads', scene.grid)
        for head, values in enumerate(maps[1:]):
            title = f'{_title(source)}: head {head}'
            _show(axes[2 + head], values, title, scene.grid, norm)
        bar = part.colorbar(ScalarMappable(norm, _CMAP), ax=axes, fraction=0.03, extend='both')
        bar.set_label('attention / uniform', fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def _title(source: str) -> str:
    return SENSORS[source].title.split()[0] if source in SENSORS else 'Cross-attention'


class _Picture(NamedTuple):
    title: str
    rgba: Array


def _pictures(scene: Scene, max_side: int) -> dict[str, _Picture]:
    """A picture of each sensor."""
    pictures = {}
    for key, raster in scene.rasters.items():
        wanted = {'s1': ('VV', 'VH'), 's2': RGB_BANDS}[key]
        if not set(wanted) <= set(raster.bands):
            wanted = (next(iter(raster.bands)),)
        pixels, valid = scene.thumbnail(wanted, max_side)
        name = raster.sensor.title.split()[0]
        if wanted == RGB_BANDS:
            title = f'{name} true colour'
        elif len(wanted) == 2:
            title = f'{name} VV, VH, VV/VH'
            # The ratio of two polarisations is a difference in dB.
            pixels = np.concatenate([pixels, pixels[:1] - pixels[1:]])
        else:
            title = f'{name} {wanted[0]}'
            pixels = pixels.repeat(3, axis=0)
        pictures[key] = _Picture(title, _stretch(pixels, valid))
    return pictures


def _stretch(pixels: Array, valid: npt.NDArray[np.bool_]) -> Array:
    """RGBA of three bands, each from its 2nd to its 98th percentile; clear where not valid.

    A gamma of 0.7 opens the shadows.
    """
    rgba = np.zeros((*valid.shape, 4), np.float32)
    if valid.any():
        for i, band in enumerate(pixels):
            low, high = np.percentile(band[valid], (2, 98))
            stretched = (band - low) / max(high - low, 1e-6)
            rgba[..., i] = np.where(valid, stretched, 0).clip(0, 1) ** 0.7
    rgba[..., 3] = valid
    return rgba


def _drape(values: Array, picture: Array, norm: Normalize) -> Array:
    """Colours of a map, shaded by the brightness of a picture."""
    rgba = _CMAP(norm(np.nan_to_num(values))).astype(np.float32)
    luma = picture[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    rgba[..., :3] *= 0.4 + 0.6 * np.sqrt(luma[..., None])
    rgba[..., 3] = np.isfinite(values)
    return rgba


def _read_attention(
    raster: Path, heads: Mapping[str, int], shape: tuple[int, int]
) -> dict[str, Array]:
    """Maps of each source at the size of a picture: mean first, then heads."""
    with rasterio.open(raster) as src:
        pixels = src.read(out_shape=(src.count, *shape))
    ends = np.cumsum([1 + count for count in heads.values()])[:-1]
    return dict(zip(heads, np.split(pixels, ends), strict=True))


def _limits(maps: Array) -> Normalize:
    """A colour scale that single extreme patches do not rule."""
    known = maps[np.isfinite(maps)]
    low, high = np.percentile(known, (1, 99)) if known.size else (0, 1)
    return Normalize(low, high)


def _panels(part: SubFigure, lines: int, columns: int) -> list[Axes]:
    axes = list(part.subplots(lines, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return axes


def _show(ax: Axes, picture: Array, title: str, grid: Grid, norm: Normalize | None = None) -> None:
    """Draw a picture upright and in the proportions of the ground."""
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], facecolor=_NO_DATA)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=8)
    ax.imshow(
        picture,
        cmap=_CMAP,
        norm=norm,
        origin='lower' if grid.transform.e > 0 else 'upper',
        aspect=_aspect(grid),
        interpolation='nearest',
    )


def _metres(grid: Grid) -> tuple[float, float]:
    """Width and height of a pixel in metres, amid the scene."""
    width, height = grid.res
    if not grid.crs.is_geographic:
        factor = grid.crs.linear_units_factor[1]
        return width * factor, height * factor
    _, latitude = grid.transform @ (grid.width / 2, grid.height / 2)
    degree = 111_320.0
    return width * degree * math.cos(math.radians(latitude)), height * degree


def _aspect(grid: Grid) -> float:
    """Height of a pixel on the ground by its width: not 1 in degrees."""
    width, height = _metres(grid)
    return height / width


def _scale_bar(ax: Axes, grid: Grid) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten metres, about a quarter of the width."""
    metres = _metres(grid)[0] * grid.width
    power = 10 ** math.floor(math.log10(metres / 4))
    length = max(step * power for step in (1, 2, 5) if step * power <= metres / 4)
    label = f'{length / 1000:g} km' if length >= 1000 else f'{length:g} m'
    share = length / metres
    ends = [0.05, 0.05 + share]
    for color, width in (('black', 4), ('white', 2)):
        ax.plot(ends, [0.06, 0.06], color=color, linewidth=width, transform=ax.transAxes)
    ax.text(
        sum(ends) / 2,
        0.095,
        label,
        color='white',
        fontsize=7,
        ha='center',
        va='bottom',
        transform=ax.transAxes,
        bbox={'facecolor': 'black', 'alpha': 0.5, 'linewidth': 0, 'pad': 1.5},
    )
