"""Writing a page: tiles, data, and the static files of the page."""

import base64
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import rasterio
from morecantile import Tile
from rich.progress import Progress

from geofm import __version__
from geofm.atomic import atomic_folder
from geofm.grid import Grid
from geofm.lonlat import boundary, extents, near
from geofm.maps.scene import CACHE_BYTES
from geofm.maps.view.page.embedding import EmbeddingGrid
from geofm.maps.view.page.layers import BACKDROP, Layer
from geofm.maps.view.page.mesh import PatchMap
from geofm.maps.view.tiles import (
    RGB,
    Classes,
    Pyramid,
    Scalar,
    Style,
    palette,
    render_tiles,
)

_MARK = '<meta name="generator" content="geofm'

_STATIC = ('page.css', 'vectors.js', 'similarity.js', 'classes.js', 'labelling.js', 'page.js')


def write_page(
    output: Path,
    layers: Sequence[Layer],
    embedding: EmbeddingGrid | Path | None = None,
    *,
    title: str,
    basemap: str | None = None,
    zooms: tuple[int, int] | None = None,
) -> Path:
    """Write a page that shows layers and the similarity of patches on a map.

    The page is a folder that needs neither network nor server: ``index.html`` opens from disk. The
    folder contains Leaflet, a pyramid of tiles for each layer, and the vectors of patches as int8,
    from which the browser computes cosine similarities.

    Args:
        output: Folder of the page. An existing page is replaced when the new one is complete.
        layers: Layers in the order of the page. The first of the group
            :data:`~geofm.maps.view.page.BACKDROP` is the initial background.
        embedding: Embedding, or its raster. Without it, the page shows no similarity.
        title: Title of the page.
        basemap: URL template of online map tiles with ``{z}``, ``{x}`` and ``{y}``. It is loaded
            only if the reader selects it. Respect its provider's terms of use.
        zooms: First and last zoom of all layers. Default: from each raster's pixel size.

    Returns:
        Path of ``index.html``.

    Raises:
        ValueError: If there is nothing to show, if the output is a folder but not a page, if the
            base map is not a template, or if a raster lies outside the latitudes of Web Mercator.
    """
    if not layers and embedding is None:
        raise ValueError('nothing to show: give layers, an embedding, or both')
    if output.exists() and not _is_page(output):
        raise ValueError(f'{output} exists and is not a page of geofm: choose another folder')
    if basemap is not None and not all(part in basemap for part in ('{z}', '{x}', '{y}')):
        raise ValueError(
            f"basemap='{basemap}' is not a URL template of tiles: it lacks {{z}}, {{x}} or {{y}}"
        )
    with (
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        Progress() as progress,
        atomic_folder(output, replace=True) as folder,
    ):
        if isinstance(embedding, Path):
            embedding = EmbeddingGrid.read(embedding)
        pyramids = _pyramids(layers, zooms)
        shown = []
        total = sum(len([*pyramid.tiles]) for pyramid in pyramids)
        task = progress.add_task('Map tiles', total=total)
        for i, (layer, pyramid) in enumerate(zip(layers, pyramids, strict=True)):
            path = f'tiles/{i:02d}-{_slug(f"{layer.group} {layer.name}")}'
            written = set()
            for tile, has_data in render_tiles(layer.raster, layer.style, pyramid, folder / path):
                progress.advance(task)
                if has_data:
                    written.add(tile)
            shown.append(_describe(layer, pyramid, written, path))
        data = {
            'title': title,
            'backdrop': BACKDROP,
            'layers': shown,
            'bounds': _bounds(layers, embedding),
            'basemap': basemap and {'url': basemap, 'credit': urlsplit(basemap).netloc},
            'embedding': embedding and _describe_embedding(embedding),
        }
        script = f'window.geofm = {json.dumps(data, ensure_ascii=False)};\n'
        (folder / 'data.js').write_text(script, 'utf-8')
        if embedding is not None:
            with (folder / 'embedding.js').open('wb') as file:
                file.write(b"window.geofm.embedding.base64 = '")
                file.write(base64.b64encode(np.ascontiguousarray(embedding.vectors)))
                file.write(b"';\n")
        _write_static(folder, title, embedding is not None)
    return output / 'index.html'


def _is_page(folder: Path) -> bool:
    index = folder / 'index.html'
    return index.is_file() and _MARK in index.read_text('utf-8')


def _pyramids(layers: Sequence[Layer], zooms: tuple[int, int] | None) -> list[Pyramid]:
    """Return the tiles of each layer. No zoom is finer than those of the interpolated layers."""
    grids = []
    for layer in layers:
        with rasterio.open(layer.raster) as src:
            grids.append(Grid.of(src))
    pairs = [*zip(layers, grids, strict=True)]
    smooth = [Pyramid.cover(g, True, zooms).zooms[1] for layer, g in pairs if layer.style.smooth]
    most = max(smooth, default=None)
    return [Pyramid.cover(grid, layer.style.smooth, zooms, most) for layer, grid in pairs]


def _describe(layer: Layer, pyramid: Pyramid, written: set[Tile], path: str) -> dict[str, Any]:
    """Return the data of a layer for the page, with the missing tiles, which it never requests."""
    ranges = {}
    for z in range(pyramid.zooms[0], pyramid.zooms[1] + 1):
        ranges[z] = pyramid.ranges(z)
    missing = [f'{t.z}/{t.x}/{t.y}' for t in pyramid.tiles if t not in written]
    return {
        'name': layer.name,
        'group': layer.group,
        'description': layer.description,
        'url': f'{path}/{{z}}/{{x}}/{{y}}.png',
        'zooms': pyramid.zooms,
        'ranges': ranges,
        'missing': missing,
        'smooth': layer.style.smooth,
        'legend': _legend(layer.style),
    }


def _legend(style: Style) -> dict[str, Any]:
    match style:
        case RGB():
            return {'kind': 'picture'}
        case Scalar():
            colors = _hex_colors(style.colormap)
            return {
                'kind': 'scalar',
                'unit': style.unit,
                'low': style.low,
                'high': style.high,
                'colors': colors,
            }
        case Classes():
            classes = [
                {'name': style.names.get(value, str(value)), 'color': bytes(color).hex()}
                for value, color in style.colors.items()
            ]
            return {'kind': 'classes', 'classes': classes}


def _describe_embedding(embedding: EmbeddingGrid) -> dict[str, Any]:
    rows, cols, dims = embedding.vectors.shape
    grid = embedding.grid
    return {
        'rows': rows,
        'cols': cols,
        'dims': dims,
        'kept': embedding.kept,
        'crs': grid.crs.to_string(),
        'transform': [*grid.transform][:6],
        'geographic': grid.crs.is_geographic,
        'map': PatchMap.of(grid).as_json(),
        'colors': {'similarity': _hex_colors('viridis'), 'difference': _hex_colors('PuOr')},
    }


def _hex_colors(name: str) -> list[str]:
    return [bytes(color).hex() for color in palette(name)]


def _bounds(layers: Sequence[Layer], embedding: EmbeddingGrid | None) -> list[list[float]]:
    """Return the south-west and north-east corners of all layers in degrees.

    East exceeds 180 across the antimeridian, as Leaflet expects.
    """
    grids = [embedding.grid] if embedding is not None else []
    for layer in layers:
        with rasterio.open(layer.raster) as src:
            grids.append(Grid.of(src))
    boxes = np.array([extents(boundary(grid)[None])[0] for grid in grids])
    boxes[:, [0, 2]] += (near(boxes[:, 0], boxes[0, 0]) - boxes[:, 0])[:, None]
    west, south = boxes[:, :2].min(axis=0).tolist()
    east, north = boxes[:, 2:].max(axis=0).tolist()
    return [[south, west], [north, east]]


def _slug(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def _write_static(folder: Path, title: str, embedding: bool) -> None:
    """Write the page's own files and copy Leaflet's."""
    own = files('geofm.maps.view.page') / 'static'
    leaflet = files('xstatic.pkg.leaflet') / 'data'
    for name in _STATIC:
        (folder / name).write_bytes((own / name).read_bytes())
    (folder / 'leaflet').mkdir()
    for name in ('leaflet.js', 'leaflet.css'):
        (folder / 'leaflet' / name).write_bytes((leaflet / name).read_bytes())
    (folder / 'leaflet' / 'LICENSE').write_bytes((own / 'leaflet-LICENSE').read_bytes())
    page = Template((own / 'index.html').read_text('utf-8')).substitute(
        title=html.escape(title),
        version=__version__,
        embedding='<script src="embedding.js" defer></script>' if embedding else '',
    )
    (folder / 'index.html').write_text(page, 'utf-8')
