"""Write small archives and their tables for tests."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine
from rasterio.warp import transform_bounds

from geofm.datasets.table import RasterTable
from geofm.sample.scenes import write_sample_scenes

DAY0 = date(2018, 6, 1)


def table_of(file: Path, rows: Sequence[Mapping[str, Any]]) -> RasterTable:
    """Make a table whose files are scanned with rasterio, not by the package."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, names, restval='')
        writer.writeheader()
        writer.writerows(rows)
    table = RasterTable.read(file)
    epsg, height, width = table.epsg.copy(), table.height.copy(), table.width.copy()
    transform, bounds = table.transform.copy(), table.bounds.copy()
    for row in range(len(table)):
        path = table.path(row)
        if path.endswith('.npy'):
            height[row], width[row] = np.load(path, mmap_mode='r').shape[-2:]
            continue
        with rasterio.open(path) as src:
            height[row], width[row] = src.shape
            if src.crs is not None:
                epsg[row], transform[row] = src.crs.to_epsg(), tuple(src.transform)[:6]
                bounds[row] = transform_bounds(src.crs, 'EPSG:4326', *src.bounds)
    scanned: dict[str, Any] = {
        'epsg': epsg,
        'height': height,
        'width': width,
        'transform': transform,
    }
    return dataclasses.replace(table, bounds=bounds, **scanned)


def boxes_table(file: Path, boxes: Sequence[Mapping[str, Any]]) -> RasterTable:
    """Make a table of rasters that do not exist, from ``x, y, size, res, epsg`` and columns."""
    own = ('x', 'y', 'height', 'width', 'res', 'epsg')
    rows = [
        {'path': f'{i}.tif', 'datetime': '', **{k: v for k, v in box.items() if k not in own}}
        for i, box in enumerate(boxes)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, names, restval='')
        writer.writeheader()
        writer.writerows(rows)
    table = RasterTable.read(file)
    transform = [
        tuple(Affine(box['res'], 0, box['x'], 0, -box['res'], box['y']))[:6] for box in boxes
    ]
    return dataclasses.replace(
        table,
        epsg=np.array([box.get('epsg', 32631) for box in boxes], np.int32),
        height=np.array([box['height'] for box in boxes], np.int32),
        width=np.array([box['width'] for box in boxes], np.int32),
        transform=np.array(transform, float),
    )


def day(number: int) -> str:
    """Format a date."""
    return str(DAY0 + timedelta(number))


def sample_table(root: Path, files: str = 'scene', **kwargs: Any) -> RasterTable:
    """Write the generated scenes with their elevation model, and their table."""
    write_sample_scenes(root, files, **kwargs)  # type: ignore[arg-type]
    rows = []
    for path in sorted(root.rglob('*.tif')):
        sensor, *rest = path.stem.split('_')
        if path.stem == 'land_cover':
            continue
        rows.append(
            {
                'path': path.relative_to(root),
                'sensor': sensor,
                'datetime': '' if not rest else f'{rest[0][:4]}-{rest[0][4:6]}-{rest[0][6:]}',
                'place': path.parent.name,
                'band': rest[1] if len(rest) > 1 else '',
            }
        )
    return table_of(root / 'table.csv', rows)
