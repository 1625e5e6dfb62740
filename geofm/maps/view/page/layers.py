"""Layers of a page: pictures of the scene, and the products made from it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.io import DatasetReader
from rio_tiler import reader
from rio_tiler.expression import parse_expression

from geofm.maps.make.segments import segment_colors
from geofm.maps.scene import SensorRaster, files_by_sensor
from geofm.maps.view.tiles import RGB, Classes, Colour, Scalar, Style, default_nodata, evaluate
from geofm.sensors import SENSORS, Sensor
from geofm.stretch import PICTURE, SCALE, value_range

#: Group of the background layers, of which the page always shows one.
BACKDROP = 'Scene'

#: Products that a page can show, which their file names end with.
PRODUCTS = (
    'attention',
    'rollout',
    'point',
    'pca',
    'foreground',
    'segments',
    'change',
    'embedding',
)

#: Titles of the groups of attention products.
_ATTENTION = {
    'attention': 'Attention',
    'rollout': 'Attention rollout',
    'point': 'Attention of a point',
}

#: Maximum side in pixels at which rasters are read to choose a colour scale.
_MOST_SIDE = 1024


@dataclass(frozen=True)
class Layer:
    """A layer of a page.

    Attributes:
        name: Name within the group.
        raster: Raster that is drawn.
        style: Style of the raster.
        group: Heading on the page. Layers of :data:`BACKDROP` are drawn below the others.
        description: Description for the reader of the page.
    """

    name: str
    raster: Path
    style: Style
    group: str
    description: str = ''


def find_products(directory: Path, scene: str | None = None) -> dict[str, Path]:
    """Find the products of one scene in a folder.

    Args:
        directory: Folder of ``<scene>_<product>.tif``, as :func:`geofm.maps.map_scene` writes them.
        scene: Name of the scene. May be None if the folder has products of one scene only.

    Returns:
        The files by product, in the order of :data:`PRODUCTS`.

    Raises:
        ValueError: If there are no products, or products of several scenes.
    """
    found: dict[str, dict[str, Path]] = {}
    for product in PRODUCTS:
        for path in sorted(directory.glob(f'*_{product}.tif')):
            found.setdefault(path.name.removesuffix(f'_{product}.tif'), {})[product] = path
    if scene is not None:
        found = {stem: files for stem, files in found.items() if stem == scene}
    if not found:
        name = scene or '<scene>'
        wanted = ', '.join(f'{name}_{product}.tif' for product in PRODUCTS)
        raise ValueError(f'{directory}: no product found ({wanted}); make them with `geofm map`')
    if len(found) > 1:
        raise ValueError(f'{directory}: products of several scenes, choose one: {sorted(found)}')
    return next(iter(found.values()))


def scene_layers(
    s1: Path | None = None,
    s2: Path | None = None,
    scene: Mapping[str, Path | None] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[Layer]:
    """Return layers with pictures of the scene.

    Args:
        s1: Sentinel-1 raster.
        s2: Sentinel-2 raster.
        scene: Rasters of any sensors by key.
        names: Name of each band of a raster by sensor, for files without band descriptions.

    Returns:
        A picture of each raster, e.g. true colour of Sentinel-2 and a composite of Sentinel-1's
        polarisations, starting with the reference sensor.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a raster cannot be read, or lacks bands of its picture.
    """
    files = files_by_sensor(s1, s2, scene)
    layers: list[Layer] = []
    for key in sorted(files, key=lambda key: -SENSORS[key].grid_priority):
        layer = _scene_layer(files[key], SENSORS[key], (names or {}).get(key))
        if layer.name in {other.name for other in layers}:
            layer = replace(layer, name=f'{layer.name} ({key})')
        layers.append(layer)
    return layers


def _scene_layer(path: Path, sensor: Sensor, names: Sequence[str] | None) -> Layer:
    """Return the layer of a raster."""
    drawing = sensor.drawing
    wanted = _bands(path, sensor, drawing.bands, names)
    terms = [
        wanted[band] if minus is None else f'{wanted[band]}-{wanted[minus]}'
        for band, minus in drawing.terms
    ]
    fill = 0.0 if sensor.fills_zero else None
    if len(terms) == 1:
        style = _stretched(path, ';'.join(terms * 3), fill)
        low, high = style.ranges[0]
        scalar = Scalar(
            low,
            high,
            int(terms[0].removeprefix('b')),
            drawing.cmap,
            f'{drawing.title}, {sensor.unit}',
        )
        text = f'{sensor.short_title}: {drawing.title}, from the 2nd to the 98th percentile.'
        return Layer(_layer_name(sensor), path, scalar, BACKDROP, text)
    red, green, blue = drawing.channels
    return Layer(
        _layer_name(sensor),
        path,
        _stretched(path, ';'.join(terms), fill),
        BACKDROP,
        f'{sensor.short_title}: red {red}, green {green}, blue {blue}, each from the 2nd to the '
        '98th percentile.',
    )


def _layer_name(sensor: Sensor) -> str:
    if sensor.quantity == 'backscatter':
        return 'Radar'
    title = sensor.drawing.title
    return f'{title[:1].upper()}{title[1:]}'


def product_layers(products: dict[str, Path]) -> list[Layer]:
    """Return the layers of products.

    Args:
        products: Files by product, as of :func:`find_products`. The embedding has no layer.

    Returns:
        One layer per band of attention, and one per other product.
    """
    layers = []
    for product, title in _ATTENTION.items():
        if product in products:
            layers += _attention_layers(products[product], title)
    if 'pca' in products:
        text = 'First three principal components of the patch tokens as red, green and blue.'
        layers.append(Layer('PCA', products['pca'], RGB(smooth=False), 'Features', text))
    if 'foreground' in products:
        with rasterio.open(products['foreground']) as src:
            classes = Classes(_class_colors(src), {0: 'background', 1: 'foreground'})
        text = 'Patches separated by the sign of their first principal component.'
        layers.append(Layer('Foreground', products['foreground'], classes, 'Features', text))
    if 'segments' in products:
        with rasterio.open(products['segments']) as src:
            classes = Classes(_class_colors(src))
        text = 'Clusters of patch tokens (k-means). Colours have no meaning.'
        layers.append(Layer('Segments', products['segments'], classes, 'Features', text))
    if 'change' in products:
        layers.append(_change_layer(products['change']))
    return layers


def _bands(
    path: Path, sensor: Sensor, wanted: Sequence[str], names: Sequence[str] | None
) -> dict[str, str]:
    """Return the names of bands in rio-tiler's expressions, by band name without the sensor."""
    raster = SensorRaster.open(path, sensor, bands=names)
    raster.src.close()
    if missing := [name for name in wanted if sensor.channel(name) not in raster.bands]:
        raise ValueError(f'{path}: no band {", ".join(missing)}, which the picture needs')
    return {name: f'b{raster.bands[sensor.channel(name)] + 1}' for name in wanted}


def _stretched(path: Path, expression: str, fill: float | None) -> RGB:
    """Return a style that stretches each channel from its 2nd to its 98th percentile."""
    # Products of Sentinel-1 and -2 are 0 outside the swath, with or without a nodata tag.
    style = RGB(expression, gamma=0.7, fill=fill)
    with rasterio.open(path) as src:
        image = reader.read(
            src,
            indexes=parse_expression(expression),
            max_size=_MOST_SIDE,
            nodata=default_nodata(src, style),
        )
    values, hidden = evaluate(image, style)
    if hidden.all():
        raise ValueError(f'{path}: no pixel has data')
    channels = values.data[:, ~hidden].astype(np.float64)
    return replace(style, ranges=tuple(value_range(channel, PICTURE) for channel in channels))


def _attention_layers(path: Path, title: str) -> list[Layer]:
    with rasterio.open(path) as src:
        shrink = max(1, max(src.shape) / _MOST_SIDE)
        shape = (src.count, *(max(1, round(side / shrink)) for side in src.shape))
        values = src.read(out_shape=shape, masked=True).astype(np.float64).filled(np.nan)
        names = [text or f'band {i}' for i, text in enumerate(src.descriptions, start=1)]
        tags = src.tags()
    unit = tags.get('unit', 'Attention relative to uniform attention')
    model = f' Model: {tags["model"]}.' if 'model' in tags else ''
    layers = []
    bands = [_group_and_name(title, name) for name in names]
    for i, (group, name) in enumerate(bands):
        # Heads of one source share a scale, so that they can be compared.
        together = [k for k, band in enumerate(bands) if band[0] == group]
        low, high = value_range(values[together], SCALE)
        style = Scalar(low, high, i + 1, 'cividis', 'attention / uniform')
        layers.append(Layer(name, path, style, group, f'{unit[:1].upper()}{unit[1:]}.{model}'))
    return layers


def _change_layer(path: Path) -> Layer:
    with rasterio.open(path) as src:
        shrink = max(1, max(src.shape) / _MOST_SIDE)
        shape = (1, *(max(1, round(side / shrink)) for side in src.shape))
        values = src.read(out_shape=shape, masked=True).astype(np.float64).filled(np.nan)
        tags = src.tags()
    # The scale starts at 0, so that a scene without change is dark.
    high = max(value_range(values, SCALE)[1], 1e-3)
    before, after = (tags.get(f'{which}_date', 'unknown') for which in ('before', 'after'))
    text = (
        f'Before: {before}. After: {after}. Cosine distance of the embeddings: 0 for the same '
        'direction (no change), 1 for orthogonal vectors, at most 2.'
    )
    return Layer('Change', path, Scalar(0, high, 1, 'inferno', 'cosine distance'), 'Features', text)


def _group_and_name(title: str, description: str) -> tuple[str, str]:
    """Return the group and the name of a band of attention, such as 's1 block 11 head 0'."""
    key, _, rest = description.partition(' ')
    source = SENSORS[key].short_title if key in SENSORS else key.capitalize()
    if part := re.fullmatch(r'(.+) (mean|head \d+)', rest):
        return f'{title}: {source}, {part[1]}', part[2].capitalize()
    return title, source if rest == 'rollout' else f'{source} {rest}'.strip()


def _class_colors(src: DatasetReader) -> dict[int, Colour]:
    """Return the colours of the classes that occur, from the file or from a palette."""
    values: set[int] = set()
    for _, window in src.block_windows(1):
        values |= {*src.read(1, window=window, masked=True).compressed().tolist()}
    try:
        table = src.colormap(1)
    except ValueError:
        return {
            v: color
            for v, color in segment_colors(max(values, default=0) + 1).items()
            if v in values
        }
    return {v: table[v][:3] for v in sorted(values) if v in table}
