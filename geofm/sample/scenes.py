"""Sample data as an archive of scenes with elevation, not in the layout of SEN12MS-CR-TS."""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
import shapely
import shapely.geometry
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform, transform_bounds
from rich.progress import track

from geofm import __version__
from geofm.atomic import atomic_folder
from geofm.grid import Grid
from geofm.sample.classes import LAND_COVER
from geofm.sample.files import (
    date_in_2018,
    read_same_data,
    write_land_cover,
    write_manifest,
    write_raster,
)
from geofm.sample.landscape import draw_landscape
from geofm.sample.plan import DEFAULT_ROIS, dates_of, patches_of, randomness
from geofm.sample.scene import NATIVE_PIXEL_SIZES, draw_region, sentinel1, sentinel2
from geofm.sen12ms import Roi, region_of
from geofm.sensors import SENSORS

#: One file per scene, or one file per band at the native pixel size of the band.
SceneFiles = Literal['scene', 'band']

#: Pixel size of the elevation model in multiples of 10 m.
_DEM_FACTOR = 3

#: The side of a scene must be a multiple of this, so that it is a whole number of pixels of every
#: size.
_STEP = 6

_FORMAT = 2
_SOURCE = """\
GENERATED DATA, not measurements: no result on them says anything about the Earth.

Written by geofm {version} (scenes format {format}, seed {seed}).

{places} places, {dates} dates each, {size} x {size} pixels of 10 m in UTM.
PLACE/s1_DATE.tif        VV and VH in dB
PLACE/s2_DATE.tif        13 bands of Level-1C digital numbers, or one file per band
PLACE/dem.tif            elevation in metres, pixels of 30 m
PLACE/land_cover.tif     {classes}
points.geojson           {points} points with the class of their pixel
stac.json                STAC items of the scenes of both sensors, if they have one file each
"""

#: Total number of points with known land cover.
_POINTS = 200

#: Properties of the STAC items of each sensor.
_STAC_PROPERTIES = {
    's1': {'constellation': 'sentinel-1', 'sar:product_type': 'GRD'},
    's2': {'constellation': 'sentinel-2', 'processing:level': 'L1C'},
}


def write_sample_scenes(
    dest: str | os.PathLike[str],
    files: SceneFiles = 'scene',
    rois: Sequence[Roi] = DEFAULT_ROIS[:6],
    dates: int = 3,
    size: int = 480,
    seed: int = 0,
) -> Path:
    """Write generated scenes of Sentinel-1 and Sentinel-2, elevation and land cover.

    The landscapes are those of :func:`~geofm.datasets.write_sample_data`, in one folder per place
    and in the UTM zone of the place. The same arguments give identical files.

    Args:
        dest: Folder to write. If it already holds the same data, nothing is written.
        files: 'scene' for one file with all bands of a scene on one grid; 'band' for one file per
            band, with pixels of 10, 20 or 60 m for Sentinel-2.
        rois: Regions of interest from the official list of SEN12MS-CR-TS.
        dates: Number of dates per sensor and place, 1 to 30.
        size: Height and width of a scene in pixels of 10 m, a multiple of 6.
        seed: Random seed.

    Returns:
        The folder.

    Raises:
        ValueError: If an argument is out of range, or *dest* has other content.
    """
    if size < _STEP * 8 or size % _STEP:
        raise ValueError(f'size must be a multiple of {_STEP}, {_STEP * 8} or more, not {size}')
    if not 1 <= dates <= 30:
        raise ValueError(f'dates must be 1 to 30, not {dates}')
    dest = Path(dest)
    names = [f'{season}/{roi}' for season, roi in rois]
    made_with = {
        'scenes_format': _FORMAT,
        'seed': seed,
        'files_per': files,
        'rois': names,
        'dates': dates,
        'size': size,
    }
    if dest.is_file() or (dest.is_dir() and any(dest.iterdir())):
        read_same_data(dest, made_with)
        return dest
    with atomic_folder(dest) as part:
        for roi in track(rois, 'Sample scenes'):
            _write_place(part, roi, files, dates, size, seed)
        classes = ', '.join(f'{i} {c.name}' for i, c in enumerate(LAND_COVER))
        text = _SOURCE.format(
            version=__version__,
            format=_FORMAT,
            seed=seed,
            places=len(rois),
            dates=dates,
            size=size,
            classes=classes,
            points=_POINTS,
        )
        (part / 'SOURCE.txt').write_text(text)
        _write_points(part, seed)
        if files == 'scene':
            _write_stac(part)
        write_manifest(part, made_with)
    return dest


def _write_place(root: Path, roi: Roi, files: SceneFiles, dates: int, size: int, seed: int) -> None:
    """Write all files of a place."""
    season, number = roi
    folder = root / f'{region_of(*roi)}_{season.removeprefix("ROIs")}_{number}'
    grid = _utm_grid(roi, size)
    landscape = draw_landscape(randomness(seed, roi, 0), (size, size))
    region = draw_region(randomness(seed, roi, 1))
    write_land_cover(folder / 'land_cover.tif', landscape.land_cover[None], grid)
    elevation = _coarser(landscape.elevation, _DEM_FACTOR)
    write_raster(folder / 'dem.tif', elevation[None], _coarser_grid(grid, _DEM_FACTOR))
    for step, date in enumerate(dates_of(randomness(seed, roi, 2), dates)):
        s1 = sentinel1(randomness(seed, roi, 3, step), landscape, region, date.s1)
        s2, _ = sentinel2(randomness(seed, roi, 4, step), landscape, region, date.s2, date.cover)
        for sensor, image, day in (('s1', s1, date.s1), ('s2', s2, date.s2)):
            stem = f'{sensor}_{date_in_2018(day):%Y%m%d}'
            bands = SENSORS[sensor].band_names
            if files == 'scene':
                write_raster(folder / f'{stem}.tif', image, grid, bands)
                continue
            factors = [1] * len(bands)
            if sensor == 's2':
                factors = [pixels // 10 for pixels in NATIVE_PIXEL_SIZES]
            for band, pixels, factor in zip(bands, image, factors, strict=True):
                values = _coarser(pixels, factor)[None]
                write_raster(folder / f'{stem}_{band}.tif', values, _coarser_grid(grid, factor))


def _write_points(root: Path, seed: int) -> None:
    """Write points of known land cover in all places as GeoJSON."""
    rng = np.random.default_rng([seed, _POINTS])
    files = sorted(root.glob('*/land_cover.tif'))
    features = []
    for file, points in zip(files, np.array_split(np.arange(_POINTS), len(files)), strict=True):
        with rasterio.open(file) as src:
            classes, to_ground, crs = src.read(1), src.transform, src.crs
        pixels = rng.choice(classes.size, len(points), replace=False)
        rows, cols = np.unravel_index(pixels, classes.shape)
        xs, ys = to_ground @ (cols + 0.5, rows + 0.5)
        for x, y, value in zip(
            *transform(crs, 'EPSG:4326', xs, ys), classes[rows, cols], strict=True
        ):
            place = {'type': 'Point', 'coordinates': [round(x, 7), round(y, 7)]}
            properties = {'class': LAND_COVER[int(value)].name}
            features.append({'type': 'Feature', 'properties': properties, 'geometry': place})
    collection = {'type': 'FeatureCollection', 'features': features}
    (root / 'points.geojson').write_text(json.dumps(collection, indent=1) + '\n')


def _write_stac(root: Path) -> None:
    """Write a STAC item collection of the scenes."""
    items = []
    for path in sorted(root.glob('*/s[12]_*.tif')):
        sensor, day = path.stem.split('_')
        with rasterio.open(path) as src:
            box = transform_bounds(src.crs, 'EPSG:4326', *src.bounds)
        item = pystac.Item(
            f'{path.parent.name}_{path.stem}',
            geometry=shapely.geometry.mapping(shapely.box(*box)),
            bbox=list(box),
            datetime=datetime.datetime.strptime(day, '%Y%m%d').replace(tzinfo=datetime.UTC),
            properties=dict(_STAC_PROPERTIES[sensor]),
        )
        bands = [{'name': name} for name in SENSORS[sensor].band_names]
        href = f'./{path.relative_to(root).as_posix()}'
        asset = pystac.Asset(href, extra_fields={'eo:bands': bands}, roles=['data'])
        item.add_asset('data', asset)
        items.append(item)
    collection = pystac.ItemCollection(items).to_dict()
    (root / 'stac.json').write_text(json.dumps(collection, indent=1) + '\n')


def _utm_grid(roi: Roi, size: int) -> Grid:
    """Return the grid of a place: pixels of 10 m in the UTM zone of its north-west corner."""
    corner = patches_of(roi, 1, 1)[0].grid.transform
    zone = int((corner.c + 180) // 6) + 1
    crs = CRS.from_epsg(32600 + zone)
    xs, ys = transform('EPSG:4326', crs, [corner.c], [corner.f])
    left, top = (round(value / 60) * 60 for value in (xs[0], ys[0]))
    return Grid(crs, Affine(10, 0, left, 0, -10, top), size, size)


def _coarser_grid(grid: Grid, factor: int) -> Grid:
    """Return a grid of the same ground with larger pixels."""
    transform = grid.transform @ Affine.scale(factor)
    return Grid(grid.crs, transform, grid.height // factor, grid.width // factor)


def _coarser(image: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """Average blocks of pixels, and keep the data type."""
    if factor == 1:
        return image
    height, width = (side // factor for side in image.shape)
    blocks = image.reshape(height, factor, width, factor).mean(axis=(1, 3))
    if image.dtype.kind in 'iu':
        blocks = np.rint(blocks)
    return blocks.astype(image.dtype)
