"""Change between two dates: how far the embeddings of each patch are apart."""

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
from geofm.maps.make.windows import Floats, Strip
from geofm.maps.make.writer import write_pixels
from geofm.rasters import open_raster

_SUFFIX = f'{END}.tif'
_CACHE_BYTES = 256 * 2**20


def map_change(before: Path, after: Path, output: Path, command: str = 'geofm change') -> Path:
    """Map the cosine distance of the embeddings of two dates.

    The distance of two vectors is 1 minus the cosine of the angle between them: 0 where they point
    the same way, 1 where they are orthogonal, 2 where they are opposite. It is read and written
    strip by strip.

    Args:
        before: Embedding of the first date, ``<scene>_embedding.tif`` of
            :func:`geofm.maps.map_scene`.
        after: That of the second date, by the same model and on the same grid.
        output: Folder of the map; made if it isn't there.
        command: Command to note in the file.

    Returns:
        ``<scene>_change.tif``, named after the second scene: float32, one pixel per patch, NaN
        where either embedding has no data. Its tags hold both dates.

    Raises:
        FileNotFoundError: If a file is missing.
        LockedError: If another process is writing to the folder.
        ValueError: If a file is no embedding, or the two are of different models or grids.
    """
    for path in (before, after):
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file; give a *{_SUFFIX} of `geofm embed`')
    path = output / f'{after.name.removesuffix(_SUFFIX).removesuffix(".tif")}_change.tif'
    with (
        rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES),
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
    """Check that the two can be compared."""
    for src in (first, second):
        check_embedding(src)
    one, other = (src.tags()['weights_sha256'] for src in (first, second))
    if one != other or first.count != second.count:
        raise ValueError(
            f'{second.name}: embedding of another model than {first.name} (weights {other[:12]} '
            f'and {one[:12]}): run `geofm embed` on both dates with the same checkpoint'
        )
    if Grid.of(first) != Grid.of(second):
        raise ValueError(
            f'{second.name}: its patches are not those of {first.name}: warp both scenes onto '
            'one grid (gdalwarp -t_srs -te -tr), then run `geofm embed` on each'
        )


def _tags(which: str, path: Path, tags: Mapping[str, str]) -> dict[str, str]:
    """File and dates of one embedding, as tags that begin with 'before' or 'after'."""
    dates = {k: v for k, v in tags.items() if k.endswith('_date') and v != 'NaT'}
    days = ', '.join(dict.fromkeys(dates.values())) or 'unknown'
    each = {f'{which}_{key}': value for key, value in dates.items()}
    return {which: path.name, f'{which}_date': days, **each}


def _strips(first: DatasetReader, second: DatasetReader, progress: Progress) -> Iterator[Strip]:
    """Distances from top to bottom, (1, rows, columns)."""
    for window in progress.track(strip_windows(first), description='Comparing'):
        one, other = (_unit(read_vectors(src, window)) for src in (first, second))
        distance = 1 - (one * other).sum(axis=0, keepdims=True)
        values = distance.clip(0, 2).astype(np.float32)
        yield Strip(values, np.isfinite(values[0]))


def _unit(vectors: Floats) -> Floats:
    """Unit vectors (D, rows, columns); NaN without data, or without length."""
    # A sum over all bands: NaN in any of them makes the patch unknown.
    lengths = np.linalg.norm(vectors, axis=0)
    lengths[lengths == 0] = np.nan
    return (vectors / lengths).astype(np.float32, copy=False)
