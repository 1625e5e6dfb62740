"""Change between two dates: the distance between the embeddings of each patch."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import rasterio
from rasterio.io import DatasetReader
from rich.progress import Progress

from geofm import __version__
from geofm.grid import Grid
from geofm.locking import locked_folder
from geofm.maps.make.embedding_files import END, check_embedding, read_vectors, strip_windows
from geofm.maps.make.embeddings import unit_vectors
from geofm.maps.make.windows import Strip
from geofm.maps.make.writer import write_pixels
from geofm.maps.scene import CACHE_BYTES
from geofm.rasters import open_raster

_SUFFIX = f'{END}.tif'


def map_change(before: Path, after: Path, output: Path, command: str = 'geofm change') -> Path:
    """Map the cosine distance of the embeddings of two dates.

    The cosine distance is 1 minus the cosine of the angle between two vectors: 0 if they have the
    same direction, 1 if they are orthogonal, 2 if they are opposite. Files are read and written
    strip by strip.

    Args:
        before: Embedding of the first date, ``<scene>_embedding.tif`` of
            :func:`geofm.maps.map_scene`.
        after: Embedding of the second date, by the same model and on the same grid.
        output: Folder of the map. It is created if it does not exist.
        command: Command to write to the tags of the file.

    Returns:
        ``<scene>_change.tif``, named after the second scene: float32, one pixel per patch, NaN
        where an embedding has no data. Its tags contain both dates.

    Raises:
        FileNotFoundError: If a file does not exist.
        LockedError: If another process is writing to the folder.
        ValueError: If a file is not an embedding, or if the models or the grids differ.
    """
    for path in (before, after):
        if not path.is_file():
            raise FileNotFoundError(
                f'{path}: no such file; give a *{_SUFFIX} written by `geofm embed`'
            )
    path = output / f'{after.name.removesuffix(_SUFFIX).removesuffix(".tif")}_change.tif'
    with (
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES),
        open_raster(before) as first,
        open_raster(after) as second,
        locked_folder(output),
        Progress() as progress,
    ):
        _check(first, second)
        tags = {
            **_tags('before', before, first.tags()),
            **_tags('after', after, second.tags()),
            'TIFFTAG_SOFTWARE': f'geofm {__version__}',
            'model': second.tags().get('model', ''),
            'weights_sha256': second.tags()['weights_sha256'],
            'unit': 'cosine distance of embeddings, 0 to 2',
            'command': command,
        }
        strips = _strips(first, second, progress)
        write_pixels(path, Grid.of(second), 1, ['cosine distance'], strips, tags=tags)
    return path


def _check(first: DatasetReader, second: DatasetReader) -> None:
    """Check that two embeddings can be compared."""
    for src in (first, second):
        check_embedding(src)
    one, other = (src.tags()['weights_sha256'] for src in (first, second))
    if one != other or first.count != second.count:
        raise ValueError(
            f'{second.name} and {first.name}: embeddings of different models (weights '
            f'{other[:12]} and {one[:12]}): run `geofm embed` on both dates with the same '
            'checkpoint'
        )
    if Grid.of(first) != Grid.of(second):
        raise ValueError(
            f'{second.name} and {first.name}: their patch grids differ: warp both scenes onto one '
            'grid (gdalwarp -t_srs -te -tr), then run `geofm embed` on each'
        )


def _tags(which: str, path: Path, tags: Mapping[str, str]) -> dict[str, str]:
    """Return the file and dates of an embedding as tags that begin with 'before' or 'after'."""
    dates = {k: v for k, v in tags.items() if k.endswith('_date') and v != 'NaT'}
    days = ', '.join(dict.fromkeys(dates.values())) or 'unknown'
    each = {f'{which}_{key}': value for key, value in dates.items()}
    return {which: path.name, f'{which}_date': days, **each}


def _strips(first: DatasetReader, second: DatasetReader, progress: Progress) -> Iterator[Strip]:
    """Yield strips of distances from top to bottom."""
    for window in progress.track(strip_windows(first), description='Comparing'):
        one, other = (unit_vectors(read_vectors(src, window), 0) for src in (first, second))
        distance = 1 - (one * other).sum(axis=0, keepdims=True)
        values = distance.clip(0, 2).astype(np.float32)
        yield Strip(values, np.isfinite(values[0]))
