"""Figures of a scene with its attention maps and features."""

import math
from collections.abc import Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import rasterio
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import Affine2DBase, ScaledTranslation
from rasterio.io import DatasetReader

from geofm.atomic import atomic_file
from geofm.datasets import compose, drawing_order
from geofm.grid import Grid
from geofm.maps.scene import Scene, SensorRaster, files_by_sensor
from geofm.sensors import SENSORS
from geofm.stretch import SCALE, stretch, value_range

Array = npt.NDArray[np.float32]

#: Products that a figure shows.
DRAWN = ('pca', 'segments', 'foreground', 'change', 'attention', 'rollout', 'point')

#: Perceptually uniform, safe for colour blindness, and never black, so that the shading by the
#: picture of the scene remains visible.
_CMAP = colormaps['plasma']

#: Grey of pixels without data.
_NO_DATA = '0.82'

#: Maximum number of panels in a row.
_MOST_COLUMNS = 8

#: Width of a panel in inches.
_PANEL_INCHES = 2.4


class _Image(NamedTuple):
    """An image placed on a scene.

    Attributes:
        pixels: RGBA (rows, columns, 4), or values (rows, columns) to be coloured.
        extent: Left, right, bottom and top in pixels of the scene.
    """

    pixels: Array
    extent: tuple[float, float, float, float]


class _Panel(NamedTuple):
    title: str
    image: _Image
    norm: Normalize | None = None


class _Band(NamedTuple):
    """Panels that share a colour scale, in one or more rows."""

    panels: Sequence[_Panel]
    norm: Normalize | None = None
    label: str = 'attention / uniform attention'


def plot_products(
    files: Mapping[str, Path],
    s1: Path | None = None,
    s2: Path | None = None,
    *,
    scene: Mapping[str, Path | None] | None = None,
    reference: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
    max_side: int = 640,
) -> Figure:
    """Draw a scene and its products side by side: pictures, features, and every attention head.

    If there are no features, each picture is drawn beside the attention to its sensor.

    Args:
        files: Rasters of :func:`geofm.maps.map_scene` by product. Products of :data:`DRAWN` are
            drawn.
        s1: Sentinel-1 raster of the scene.
        s2: Sentinel-2 raster of the scene.
        scene: Rasters of any sensors by key.
        reference: Key of the sensor whose grid is used. Default: Sentinel-2 if it is given,
            otherwise the first sensor that is not static.
        names: Name of each band of a raster by sensor, for files without band descriptions.
        title: Title of the figure. Default: the name of the scene and of the products.
        max_side: Maximum side of a picture in pixels. Larger scenes are read at reduced size.

    Returns:
        The figure. It is not attached to pyplot, so it can be made in any thread.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If no raster is given, or if one cannot be used.
    """
    with _open(files_by_sensor(s1, s2, scene), reference, names or {}) as ground:
        grid, stem = ground.grid, ground.stem
        pictures = _pictures(ground, max_side)
    context = {key: _Panel(p.title, _whole(p.rgba, grid)) for key, p in pictures.items()}
    top: list[_Panel] = []
    rows: list[_Band] = []
    if 'pca' in files:
        top.append(_Panel('PCA of patch tokens', _read_rgb(files['pca'], grid, max_side)))
    top += [
        _Panel(product.capitalize(), _read_classes(files[product], grid, max_side))
        for product in ('segments', 'foreground')
        if product in files
    ]
    if 'change' in files:
        rows.append(_change_band(files['change'], grid, max_side))
    for product in ('attention', 'rollout', 'point'):
        if product in files:
            beside = context if product == 'attention' and not top else {}
            rows += _attention_bands(product, files[product], grid, max_side, pictures, beside)
    shown = {panel.title for row in rows for panel in row.panels}
    if top or not shown.issuperset(panel.title for panel in context.values()):
        rows.insert(0, _Band([*context.values(), *top]))
    kinds = {'attention': 'CLS attention', 'pca': 'PCA of patch tokens'}
    what = [kinds[product] for product in kinds if product in files]
    return _compose(rows, grid, title or ': '.join([stem, *([' and '.join(what)] if what else [])]))


def draw_map(
    values: Array,
    grid: Grid,
    title: str,
    label: str,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw one map with a colour scale, a scale bar and a north arrow.

    Args:
        values: Values of shape (rows, columns); NaN where there is no data.
        grid: Grid of the values.
        title: Title of the map.
        label: Label of the colour scale.
        marks: Column and row of texts to draw on the map, by text.

    Returns:
        The figure.
    """
    norm = _limits(values)
    height = _PANEL_INCHES * 2.5 * grid.height * _aspect(grid) / grid.width
    figure = Figure((_PANEL_INCHES * 2.5 + 1.2, height + 0.5), dpi=130, layout='constrained')
    ax = figure.subplots()
    _show(ax, _Panel(title, _whole(values, grid), norm), grid)
    _scale_bar(ax, grid)
    _north_arrow(ax, grid)
    for text, (col, row) in (marks or {}).items():
        ax.plot(col, row, 'o', ms=9, mfc='white', mec='black', mew=1)
        ax.annotate(text, (col, row), ha='center', va='center_baseline', fontsize=6)
    bar = figure.colorbar(ScalarMappable(norm, _CMAP), ax=ax, extend='both')
    bar.set_label(label)
    return figure


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as PDF.

    Args:
        figure: The figure.
        stem: Path without the suffix.

    Returns:
        The two files.
    """
    png, pdf = (stem.with_name(f'{stem.name}{suffix}') for suffix in ('.png', '.pdf'))
    for path in (png, pdf):
        with atomic_file(path) as part:
            figure.savefig(part, dpi=200)
    return png, pdf


# -- panels -------------------------------------------------------------------------------------


def _open(
    files: Mapping[str, Path], reference: str | None, names: Mapping[str, Sequence[str]]
) -> Scene:
    """Open the scene with all bands of the files."""
    if not files:
        raise ValueError('no raster given: --s1, --s2 or both, or --scene SENSOR=FILE')
    bands: list[str] = []
    for key, path in files.items():
        raster = SensorRaster.open(path, SENSORS[key], bands=names.get(key))
        raster.src.close()
        bands += raster.bands
    return Scene(bands, names=names, files=files, reference=reference)


class _Picture(NamedTuple):
    title: str
    rgba: Array


def _pictures(scene: Scene, max_side: int) -> dict[str, _Picture]:
    """Return a picture of each sensor, starting with the reference sensor."""
    pictures = {}
    for sensor in drawing_order(scene.bands, scene.reference):
        wanted = sensor.picture_bands
        if not set(wanted) <= set(scene.rasters[sensor.name].bands):
            wanted = (next(iter(scene.rasters[sensor.name].bands)),)
        pixels, valid = scene.thumbnail(wanted, max_side)
        channels = compose(pixels, wanted, sensor)
        if channels is None:
            title, rgba = f'{sensor.short_title} {wanted[0]}', _stretch(pixels, valid)
        else:
            title = sensor.picture_title
            if sensor.unit == 'dB':
                # A difference in dB is a ratio of powers.
                title = title.replace(' − ', '/')
            rgba = _stretch(channels, valid, sensor.drawing.cmap)
        pictures[sensor.name] = _Picture(title, rgba)
    return pictures


def _stretch(pixels: Array, valid: npt.NDArray[np.bool_], cmap: str = 'gray') -> Array:
    """Return stretched RGBA of one or three bands, transparent where no pixel is valid.

    A gamma of 0.7 brightens the shadows.
    """
    picture = np.moveaxis(stretch(pixels, valid), 0, -1) ** 0.7
    if len(pixels) == 1:
        picture = colormaps[cmap](picture[..., 0])[..., :3]
    return np.dstack([picture, valid]).astype(np.float32)


def _whole(pixels: Array, grid: Grid) -> _Image:
    return _Image(pixels, (0, grid.width, grid.height, 0))


def _read(src: DatasetReader, grid: Grid, max_side: int) -> tuple[npt.NDArray[Any], _Image]:
    """Read the bands of a product at reduced size, and return their placement on the scene."""
    shrink = max(1.0, max(src.shape) / max_side)
    shape = tuple(max(1, round(side / shrink)) for side in src.shape)
    pixels = src.read(out_shape=(src.count, *shape))
    to_scene = ~grid.transform @ src.transform
    (left, top), (right, bottom) = to_scene @ (0, 0), to_scene @ (src.width, src.height)
    return pixels, _Image(np.zeros(shape, np.float32), (left, right, bottom, top))


def _read_rgb(path: Path, grid: Grid, max_side: int) -> _Image:
    with rasterio.open(path) as src:
        pixels, image = _read(src, grid, max_side)
        known = (pixels != src.nodata).all(axis=0)
    rgba = np.concatenate([pixels / 255, known[None]]).astype(np.float32)
    return image._replace(pixels=rgba.transpose(1, 2, 0))


def _read_classes(path: Path, grid: Grid, max_side: int) -> _Image:
    with rasterio.open(path) as src:
        pixels, image = _read(src, grid, max_side)
        colors = np.zeros((256, 4), np.float32)
        for value, color in src.colormap(1).items():
            colors[value] = np.array(color) / 255
        colors[int(src.nodata), 3] = 0
    return image._replace(pixels=colors[pixels[0]])


def _attention_bands(
    product: str,
    path: Path,
    grid: Grid,
    max_side: int,
    pictures: Mapping[str, _Picture],
    beside: Mapping[str, _Panel],
) -> list[_Band]:
    """Return rows of panels of a raster of attention, beside panels of the attended sensors."""
    with rasterio.open(path) as src:
        values, image = _read(src, grid, max_side)
        names = src.descriptions
    sources = [name.split()[0] for name in names]
    backdrop = next(iter(pictures.values()))

    def drape(values: Array, source: str, norm: Normalize) -> _Image:
        # Cross-attention belongs to no single sensor.
        picture = pictures.get(source, backdrop).rgba
        return _whole(_drape(values, image, picture, grid, norm), grid)

    if product != 'attention':
        # One map per source, all in one row.
        chosen = [i for i, name in enumerate(names) if ' head ' not in name]
        norm = _limits(values[chosen])
        what = 'rollout' if product == 'rollout' else 'from one patch'
        panels = [
            _Panel(f'{_title(s)}: {what}', drape(values[i], s, norm))
            for i, s in ((i, sources[i]) for i in chosen)
        ]
        return [_Band(panels, norm)]
    bands = []
    for source in dict.fromkeys(sources):
        mean, *heads = (i for i, s in enumerate(sources) if s == source)
        norm = _limits(values[[mean, *heads]])
        where = names[mean].removeprefix(source).removesuffix('mean').strip()
        panels = [beside.get(source, next(iter(beside.values())))] if beside else []
        panels.append(_Panel(f'{_title(source)}, {where}: mean', drape(values[mean], source, norm)))
        for i in heads:
            title = f'{_title(source)}: head {names[i].rpartition(" ")[2]}'
            panels.append(_Panel(title, image._replace(pixels=values[i]), norm))
        bands.append(_Band(panels, norm))
    return bands


def _change_band(path: Path, grid: Grid, max_side: int) -> _Band:
    """Return the map of change. Its scale starts at 0, so that no change has one colour."""
    with rasterio.open(path) as src:
        values, image = _read(src, grid, max_side)
        tags = src.tags()
    norm = Normalize(0, max(_limits(values).vmax or 0, 1e-3))
    # If the dates of the sensors differ, the date of the first is shown.
    before, after = (tags.get(f'{w}_date', '?').split(', ')[0] for w in ('before', 'after'))
    panel = _Panel(f'Change, {before} to {after}', image._replace(pixels=values[0]), norm)
    return _Band([panel], norm, 'cosine distance')


def _title(source: str) -> str:
    if source in SENSORS:
        return SENSORS[source].short_title
    if source.startswith('fusion_'):
        return f'Cross-attention to {_title(source.removeprefix("fusion_"))}'
    return {'fusion': 'Cross-attention', 'vit': 'ViT'}.get(source, source)


def _drape(values: Array, image: _Image, picture: Array, grid: Grid, norm: Normalize) -> Array:
    """Return the colours of a map, shaded by the brightness of a picture of the scene."""
    left, right, bottom, top = image.extent
    rows, cols = (
        ((np.arange(n) + 0.5) * side / n - start) / (end - start) * count
        for n, side, start, end, count in zip(
            picture.shape[:2], grid.shape, (top, left), (bottom, right), values.shape, strict=True
        )
    )
    # With a stride, cells may end half a cell before the scene.
    nearest = (
        i.astype(int).clip(0, n - 1) for i, n in zip((rows, cols), values.shape, strict=True)
    )
    values = values[np.ix_(*nearest)]
    known = np.isfinite(values)[..., None]
    rgba = _CMAP(norm(np.nan_to_num(values))).astype(np.float32)
    luma = (picture[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    # Pixels without a value are grey.
    rgba[..., :3] = np.where(known, rgba[..., :3] * (0.4 + 0.6 * np.sqrt(luma)), luma)
    rgba[..., 3] = picture[..., 3]
    return rgba


def _limits(maps: Array) -> Normalize:
    """Return a colour scale that outliers do not set."""
    return Normalize(*value_range(maps, SCALE))


# -- layout -------------------------------------------------------------------------------------


def _compose(bands: Sequence[_Band], grid: Grid, title: str) -> Figure:
    """Arrange panels of equal size in rows, with a colour bar beside each shared scale.

    Positions are in inches, because matplotlib's layout engines would make the panels of each row
    a different size.
    """
    most = max(len(band.panels) for band in bands)
    columns = math.ceil(most / math.ceil(most / _MOST_COLUMNS))
    lines = sum(math.ceil(len(band.panels) / columns) for band in bands)
    tall = _PANEL_INCHES * _aspect(grid) * grid.height / grid.width
    tall = min(max(tall, 0.4 * _PANEL_INCHES), 2.5 * _PANEL_INCHES)
    gap, heading = 0.08, 0.24
    width = columns * (_PANEL_INCHES + gap) + gap + (0.7 if any(b.norm for b in bands) else 0)
    height = lines * (tall + heading) + 0.3 + gap
    figure = Figure((width, height), dpi=130)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va='top')

    def add(column: float, line: int, wide: float) -> Axes:
        left = gap + column * (_PANEL_INCHES + gap)
        bottom = height - 0.3 - (line + 1) * (tall + heading)
        return figure.add_axes((left / width, bottom / height, wide / width, tall / height))

    line = 0
    for band in bands:
        for row in batched(band.panels, columns):
            for column, panel in enumerate(row):
                ax = add(column, line, _PANEL_INCHES)
                _show(ax, panel, grid)
                if line == column == 0:
                    _scale_bar(ax, grid)
                    _north_arrow(ax, grid)
            line += 1
        if band.norm is not None:
            bar = figure.colorbar(
                ScalarMappable(band.norm, _CMAP), cax=add(len(row), line - 1, 0.1), extend='both'
            )
            bar.set_label(band.label, fontsize=7)
            bar.ax.tick_params(labelsize=7)
    return figure


def _show(ax: Axes, panel: _Panel, grid: Grid) -> None:
    """Draw an image with north up and the aspect ratio of the ground."""
    ax.set(xticks=[], yticks=[], facecolor=_NO_DATA)
    ax.spines[:].set_visible(False)
    ax.set_title(panel.title, fontsize=8)
    ax.imshow(
        panel.image.pixels,
        cmap=_CMAP,
        norm=panel.norm,
        extent=panel.image.extent,
        aspect=_aspect(grid),
        interpolation='nearest',
    )
    # The last patches may reach beyond the scene.
    rows = (0, grid.height) if grid.transform.e > 0 else (grid.height, 0)
    ax.set(xlim=(0, grid.width), ylim=rows)


def _metres(grid: Grid) -> tuple[float, float]:
    """Return the width and height in metres of a pixel in the middle of the scene."""
    width, height = grid.res
    if not grid.crs.is_geographic:
        factor = grid.crs.linear_units_factor[1]
        return width * factor, height * factor
    _, latitude = grid.transform @ (grid.width / 2, grid.height / 2)
    degree = 111_320.0
    return width * degree * math.cos(math.radians(latitude)), height * degree


def _aspect(grid: Grid) -> float:
    """Return the ratio of height to width of a pixel on the ground, which is not 1 in degrees."""
    width, height = _metres(grid)
    return height / width


def _scale_bar(ax: Axes, grid: Grid) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten metres, about a quarter of the width."""
    metres = _metres(grid)[0] * grid.width
    power = 10 ** math.floor(math.log10(metres / 4))
    length = max(step * power for step in (1, 2, 5) if step * power <= metres / 4)
    label = f'{length / 1000:g} km' if length >= 1000 else f'{length:g} m'
    ends = [0.05, 0.05 + length / metres]
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


def north(grid: Grid) -> tuple[float, float]:
    """Return the direction of grid north in a picture of a scene.

    Args:
        grid: Grid of the scene. The picture has its first row at the top, or at the bottom if rows
            run northwards.

    Returns:
        Components to the right and upwards of a vector of length 1: (0, 1) unless the grid is
        rotated.
    """
    t = ~grid.transform
    up = 1 if grid.transform.e > 0 else -1
    right, above = t.b, up * t.e * _aspect(grid)
    length = math.hypot(right, above)
    return right / length, above / length


def _north_arrow(ax: Axes, grid: Grid) -> None:
    right, above = north(grid)
    figure = ax.get_figure(root=True)
    assert figure is not None
    # Coordinates in inches around a point near the upper right corner.
    place = figure.dpi_scale_trans + ScaledTranslation(0.92, 0.86, cast(Affine2DBase, ax.transAxes))
    half = 0.12
    outline = [patheffects.withStroke(linewidth=2.5, foreground='black')]
    arrow = FancyArrowPatch(
        (-half * right, -half * above),
        (half * right, half * above),
        arrowstyle='-|>',
        mutation_scale=8,
        color='white',
        transform=place,
        path_effects=outline,
        clip_on=False,
    )
    arrow.set_in_layout(False)
    ax.add_patch(arrow)
    text = ax.text(
        1.9 * half * right,
        1.9 * half * above,
        'N',
        color='white',
        fontsize=7,
        ha='center',
        va='center',
        transform=place,
        path_effects=outline,
    )
    text.set_in_layout(False)
