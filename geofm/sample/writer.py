"""Write generated sample data in the layout of SEN12MS-CR-TS."""

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from geofm import __version__
from geofm.atomic import atomic_folder
from geofm.sample.classes import LAND_COVER
from geofm.sample.files import (
    date_in_2018,
    read_same_data,
    write_land_cover,
    write_manifest,
    write_raster,
)
from geofm.sample.landscape import draw_landscape
from geofm.sample.plan import DEFAULT_ROIS, PATCHES_PER_ROW, dates_of, patches_of, randomness
from geofm.sample.scene import draw_region, sentinel1, sentinel2
from geofm.sen12ms import PairKey, Roi, SceneName, region_of

SCENES = 'scenes.csv'
SCENE_COLUMNS = ('season', 'roi', 'patch', 'time_step', 's1_date', 's2_date', 'cloud_cover')

# Must be incremented whenever the same arguments give different files.
_FORMAT = 1
_MAX_TIME_STEPS = 30
_MIN_SIZE = 16
_SOURCE = """\
GENERATED DATA, not measurements: no result on them says anything about the Earth.

Written by geofm {version} (sample data format {format}, seed {seed}).

The tree, the names, the data types, the coordinate reference system, the pixel size and the ranges
of values are those of SEN12MS-CR-TS (Ebel et al., 2022, https://doi.org/10.1109/TGRS.2022.3146246).
The numbers of its regions of interest are borrowed so that the official splits apply, but the
places are made up, and not a pixel is taken from it.

{rois} regions, {patches} patches each, {time_steps} time steps, {size} x {size} pixels.
ROIs<season>/<roi>/S1|S2/<time step>/  VV and VH in dB; 13 bands of Level-1C digital numbers
ROIs<season>/<roi>/LC/                 land-cover map of each patch: {classes}
scenes.csv                             dates, and share of a patch that clouds hide from Sentinel-2
sample.json                            what the set was made with, and the size of each file
"""


@dataclass(frozen=True)
class SampleDataSummary:
    """Summary of the data that `write_sample_data` wrote or found.

    Attributes:
        path: Folder of the data.
        rois: Number of regions of interest.
        patches: Number of patches in all regions.
        pairs: Number of S1 and S2 pairs.
        files: Number of files.
        size: Size of all files in bytes.
        reused: Whether the data already existed.
    """

    path: Path
    rois: int
    patches: int
    pairs: int
    files: int
    size: int
    reused: bool


def write_sample_data(
    dest: str | os.PathLike[str],
    rois: Sequence[Roi] = DEFAULT_ROIS,
    patches_per_roi: int = 4,
    time_steps: int = 4,
    size: int = 256,
    seed: int = 0,
) -> SampleDataSummary:
    """Write generated data in the layout of SEN12MS-CR-TS, with land-cover maps.

    Each region is a generated landscape, with images of both sensors on random dates of 2018. The
    same arguments give identical files, and a region does not depend on the other regions that are
    written. The folder is written atomically: an interrupted run leaves nothing.

    Args:
        dest: Folder to write. If it already holds the same data, nothing is written.
        rois: Regions of interest from the official list.
        patches_per_roi: Number of patches per region, 1 to 400, in an approximately square block.
            They are numbered as in the published data, with 20 per row.
        time_steps: Number of time steps per patch, 1 to 30.
        size: Height and width of a patch in pixels. It is 256 in the published data.
        seed: Random seed.

    Returns:
        Summary of the data in the folder.

    Raises:
        ValueError: If an argument is out of range, or *dest* is a file or a folder with other
            content.
    """
    _check(rois, patches_per_roi, time_steps, size, seed)
    dest = Path(dest)
    wanted = {
        'format': _FORMAT,
        'seed': seed,
        'rois': [f'{season}/{roi}' for season, roi in rois],
        'patches_per_roi': patches_per_roi,
        'time_steps': time_steps,
        'size': size,
    }
    if dest.is_file() or (dest.is_dir() and any(dest.iterdir())):
        return _summary(dest, read_same_data(dest, wanted), reused=True)
    with atomic_folder(dest) as part:
        steps = _write_tree(part, rois, patches_per_roi, time_steps, size, seed)
        for _ in track(steps, 'Sample data', total=len(rois) * time_steps):
            pass
        _write_source(part, wanted)
        manifest = write_manifest(part, wanted)
    return _summary(dest, manifest, reused=False)


def land_cover_path(root: Path, roi: Roi, patch: int) -> Path:
    """Return the path of the land-cover map of a patch.

    Args:
        root: Folder of the data.
        roi: Region of interest.
        patch: Number of the patch.

    Returns:
        Path of the file.
    """
    season, number = roi
    return root / season / str(number) / 'LC' / f'lc_{season}_{number}_patch_{patch}.tif'


def _check(
    rois: Sequence[Roi], patches_per_roi: int, time_steps: int, size: int, seed: int
) -> None:
    if not rois or len(set(rois)) < len(rois):
        raise ValueError(f'rois must be one or more different regions, got {list(rois)}')
    if unknown := [roi for roi in rois if region_of(*roi) is None]:
        raise ValueError(f'{unknown} are not among the regions of SEN12MS-CR-TS')
    limits: tuple[tuple[str, int, int, float], ...] = (
        ('patches_per_roi', patches_per_roi, 1, PATCHES_PER_ROW**2),
        ('time_steps', time_steps, 1, _MAX_TIME_STEPS),
        ('size', size, _MIN_SIZE, math.inf),
        ('seed', seed, 0, math.inf),
    )
    for name, value, lowest, highest in limits:
        if not lowest <= value <= highest:
            raise ValueError(f'{name} must be {lowest} to {highest}, got {value}')


def _summary(dest: Path, manifest: dict[str, Any], reused: bool) -> SampleDataSummary:
    patches = len(manifest['rois']) * manifest['patches_per_roi']
    return SampleDataSummary(
        path=dest,
        rois=len(manifest['rois']),
        patches=patches,
        pairs=patches * manifest['time_steps'],
        files=len(manifest['files']),
        size=sum(manifest['files'].values()),
        reused=reused,
    )


def _write_source(root: Path, made_with: dict[str, Any]) -> None:
    classes = ', '.join(f'{i} {c.name}' for i, c in enumerate(LAND_COVER))
    text = _SOURCE.format(
        version=__version__,
        classes=classes,
        rois=len(made_with['rois']),
        patches=made_with['patches_per_roi'],
        **{key: made_with[key] for key in ('format', 'seed', 'time_steps', 'size')},
    )
    (root / 'SOURCE.txt').write_text(text)


def _write_tree(
    root: Path, rois: Sequence[Roi], patches_per_roi: int, time_steps: int, size: int, seed: int
) -> Iterator[None]:
    """Write all files except the manifest; yield after each time step of a region."""
    with (root / SCENES).open('w', newline='') as file:
        scenes = csv.writer(file, lineterminator='\n')
        scenes.writerow(SCENE_COLUMNS)
        for roi in rois:
            for rows in _write_roi(root, roi, patches_per_roi, time_steps, size, seed):
                scenes.writerows(rows)
                yield


def _write_roi(
    root: Path, roi: Roi, patches_per_roi: int, time_steps: int, size: int, seed: int
) -> Iterator[list[tuple[object, ...]]]:
    """Write the files of a region; yield the rows of `SCENES` of each time step."""
    patches = patches_of(roi, patches_per_roi, size)
    shape = max(p.rows.stop for p in patches), max(p.cols.stop for p in patches)
    landscape = draw_landscape(randomness(seed, roi, 0), shape)
    region = draw_region(randomness(seed, roi, 1))
    for patch in patches:
        land_cover = landscape.land_cover[None, patch.rows, patch.cols]
        write_land_cover(land_cover_path(root, roi, patch.number), land_cover, patch.grid)
    for step, date in enumerate(dates_of(randomness(seed, roi, 2), time_steps)):
        s1 = sentinel1(randomness(seed, roi, 3, step), landscape, region, date.s1)
        s2, cloudy = sentinel2(
            randomness(seed, roi, 4, step), landscape, region, date.s2, date.cover
        )
        days = {'s1': date_in_2018(date.s1), 's2': date_in_2018(date.s2)}
        rows: list[tuple[object, ...]] = []
        for patch in patches:
            key = PairKey(*roi, patch.number, step)
            for sensor, image in (('s1', s1), ('s2', s2)):
                name = SceneName(sensor, key, days[sensor])
                path = root / name.folder / name.filename
                write_raster(path, image[:, patch.rows, patch.cols], patch.grid)
            cover = round(float(cloudy[patch.rows, patch.cols].mean()), 4)
            rows.append((*key, *days.values(), cover))
        yield rows
