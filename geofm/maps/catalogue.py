"""A STAC catalogue of the products of many scenes."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import shapely
from pystac.extensions.projection import ProjectionExtension

from geofm.atomic import atomic_file
from geofm.datasets.catalogue.footprints import SEARCH_CRS
from geofm.maps.scene import Imagery
from geofm.maps.table_scenes import TableScenes

#: Media types by ending; others have none.
_MEDIA = {
    '.tif': pystac.MediaType.COG,
    '.png': pystac.MediaType.PNG,
    '.parquet': pystac.MediaType.PARQUET,
    '.gpkg': pystac.MediaType.GEOPACKAGE,
    '.geojson': pystac.MediaType.GEOJSON,
}


def write_catalogue(scenes: TableScenes, files: Sequence[Mapping[str, Path]], folder: Path) -> Path:
    """Write a self-contained STAC catalogue: ``catalog.json``, and an item in each scene's folder.

    Args:
        scenes: The scenes. Those of which no date is known are left out, for STAC asks for one.
        files: Files of each scene by product, in its folder.
        folder: Folder of the scenes' folders.

    Returns:
        The catalogue.
    """
    catalogue = pystac.Catalog(
        'geofm',
        f'Products of {scenes.table.source}',
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    for number, products in enumerate(files):
        item = _item(scenes.scene(number), products)
        if item is not None:
            catalogue.add_item(item)
    file = folder / pystac.Catalog.DEFAULT_FILE_NAME
    catalogue.normalize_hrefs(str(folder.absolute()))
    for item in catalogue.get_items():
        item.make_asset_hrefs_relative()
        _write(folder / item.id / f'{item.id}.json', item.to_dict(include_self_link=False))
    _write(file, catalogue.to_dict(include_self_link=False))
    return file


def _item(scene: Imagery, products: Mapping[str, Path]) -> pystac.Item | None:
    """The products of a scene; None if it has no date."""
    days = [day for day in scene.days.values() if not np.isnat(day)]
    if not days:
        return None
    first, last = (
        datetime.combine(d.item(), datetime.min.time(), UTC) for d in (min(days), max(days))
    )
    outline = scene.grid.footprint(SEARCH_CRS)
    item = pystac.Item(
        scene.stem,
        json.loads(shapely.to_geojson(outline)),
        list(outline.bounds),
        first if first == last else None,
        {},
        None if first == last else first,
        None if first == last else last,
    )
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        epsg=scene.grid.crs.to_epsg(),
        shape=list(scene.grid.shape),
        transform=list(scene.grid.transform)[:6],
    )
    for product, path in sorted(products.items()):
        media = _MEDIA.get(path.suffix)
        item.add_asset(
            product, pystac.Asset(str(path.absolute()), media_type=media, roles=['data'])
        )
    return item


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON."""
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1) + '\n')
