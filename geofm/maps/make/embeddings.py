"""Embeddings of patches as GeoParquet: one row a patch."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm import lonlat
from geofm.atomic import atomic_file
from geofm.grid import Grid
from geofm.maps.make.windows import Floats, Strip

#: How the numbers of a vector are stored; 'int8' with a scale for each dimension.
Precision = Literal['float32', 'float16', 'int8']

_GROUP_ROWS = 8_192

#: Rows that are read at once.
BATCH_ROWS = 16_384


def dimension_scales(strips: Iterable[Strip]) -> Floats:
    """Scale of each dimension for int8: the largest magnitude becomes 127.

    Args:
        strips: Patch tokens, (D, rows, columns) each; NaN where nothing is known.

    Returns:
        A value is the number times this; shape (D,).
    """
    largest = np.zeros(1, np.float32)
    for strip in strips:
        magnitudes = np.abs(strip.values).reshape(len(strip.values), -1)
        # A strip without any patch is no reason to warn.
        largest = np.maximum(largest, np.where(np.isnan(magnitudes), 0, magnitudes).max(axis=1))
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


@dataclass(frozen=True)
class EmbeddingTable:
    """What a GeoParquet file of embeddings says of itself.

    Attributes:
        grid: Grid of the patches; columns 'row' and 'col' are positions in it.
        scales: Scale of each dimension if vectors are int8, else None.
        tags: Model, weights' hash and so on.
    """

    grid: Grid
    scales: tuple[float, ...] | None
    tags: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what a file says of itself.

        Args:
            path: The file.

        Returns:
            Grid, scales and tags.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no embeddings of this project.
        """
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        try:
            about = json.loads((pq.read_schema(path).metadata or {})[b'geofm'])
        except (pa.ArrowInvalid, KeyError) as error:
            raise ValueError(
                f'{path}: no table of embeddings; give a *_embedding.parquet that `geofm map` or '
                '`geofm embed` wrote'
            ) from error
        grid = Grid(
            CRS.from_user_input(about['crs']),
            Affine(*about['transform']),
            about['height'],
            about['width'],
        )
        scales = about['scales']
        return cls(grid, None if scales is None else tuple(scales), about['tags'])


class Batch(NamedTuple):
    """Some rows of a file.

    Attributes:
        rows: Rows on the patch grid (N,).
        cols: Columns on the patch grid (N,).
        vectors: Embeddings (N, D).
    """

    rows: npt.NDArray[np.intp]
    cols: npt.NDArray[np.intp]
    vectors: Floats

    def index_of(self, row: int, col: int) -> int | None:
        """Index of the patch at a position, if it is here."""
        found = np.flatnonzero((self.rows == row) & (self.cols == col))
        return int(found[0]) if len(found) else None


def read_batches(path: Path, table: EmbeddingTable) -> Iterator[Batch]:
    """Read the embeddings of a file, never all of them at once.

    Args:
        path: The file.
        table: What it says of itself.

    Yields:
        Some rows, in the order of the file.
    """
    scales = None if table.scales is None else np.array(table.scales, np.float32)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=['row', 'col', 'embedding']):
            vectors = batch.column('embedding')
            values = vectors.flatten().to_numpy(zero_copy_only=False)
            values = values.reshape(len(batch), -1).astype(np.float32)
            yield Batch(
                batch.column('row').to_numpy(),
                batch.column('col').to_numpy(),
                values if scales is None else values * scales,
            )


def write_embeddings(
    path: Path,
    grid: Grid,
    strips: Iterable[Strip],
    *,
    precision: Precision = 'float32',
    scales: Sequence[float] | None = None,
    dates: Mapping[str, np.datetime64] | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Write patch tokens as GeoParquet, strip by strip.

    A row has the footprint of a patch ('geometry', EPSG:4326, cut at 180 degrees), its 'row' and
    'col' on the patch grid, the day of acquisition of each sensor ('date_s1', 'date_s2'; null where
    unknown), and its vector ('embedding', a list of fixed size). Patches without data have no row.
    The entry 'geofm' of the file's metadata holds the patch grid, the scales of int8 and the tags,
    as JSON.

    Args:
        path: File to write.
        grid: Grid of the patches.
        strips: Patch tokens, (D, rows, columns) each, from top to bottom.
        precision: How numbers are stored.
        scales: Scale of each dimension for 'int8': a value is the number times this.
        dates: Day of acquisition by sensor.
        tags: Model, weights' hash and so on.

    Returns:
        Number of rows.

    Raises:
        ValueError: If *scales* are given for floats, or not for int8.
    """
    if (precision == 'int8') != (scales is not None):
        raise ValueError('int8 needs scales, and floats have none')
    scale = None if scales is None else np.asarray(scales, np.float32)
    days = {
        f'date_{key}': None if np.isnat(day) else day.item() for key, day in (dates or {}).items()
    }
    strips = iter(strips)
    first = next(strips)
    vector = pa.list_(pa.from_numpy_dtype(precision), len(first.values))
    schema = pa.schema(
        [
            ('geometry', pa.binary()),
            ('row', pa.int32()),
            ('col', pa.int32()),
            *((name, pa.date32()) for name in days),
            ('embedding', vector),
        ],
        metadata={
            'geo': json.dumps(_geo_metadata(grid)),
            'geofm': json.dumps(
                {
                    'crs': grid.crs.to_string(),
                    'transform': list(grid.transform)[:6],
                    'height': grid.height,
                    'width': grid.width,
                    'scales': None if scale is None else scale.tolist(),
                    'tags': dict(tags or {}),
                }
            ),
        },
    )
    count = 0
    with atomic_file(path) as part, pq.ParquetWriter(part, schema, compression='zstd') as writer:
        for rows, cols, tokens in _groups(_known([first], strips)):
            numbers = tokens if scale is None else np.rint(tokens / scale)
            flat = pa.array(numbers.astype(precision).ravel())
            columns = [
                pa.array(_footprints(grid, rows, cols), pa.binary()),
                pa.array(rows, pa.int32()),
                pa.array(cols, pa.int32()),
                *(pa.array([day] * len(rows), pa.date32()) for day in days.values()),
                pa.FixedSizeListArray.from_arrays(flat, type=vector),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
            count += len(rows)
    return count


type _Rows = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]


def _known(*parts: Iterable[Strip]) -> Iterator[_Rows]:
    """Row, column and token of each patch with data."""
    top = 0
    for part in parts:
        for strip in part:
            rows, cols = np.isfinite(strip.values).all(axis=0).nonzero()
            yield rows + top, cols, strip.values[:, rows, cols].T
            top += strip.values.shape[1]


def _groups(parts: Iterable[_Rows]) -> Iterator[_Rows]:
    """Put strips together to groups that are worth a block of the file."""
    held: list[_Rows] = []
    for part in parts:
        held.append(part)
        if sum(len(rows) for rows, _, _ in held) >= _GROUP_ROWS:
            yield _join(held)
            held = []
    if held:
        yield _join(held)


def _join(parts: list[_Rows]) -> _Rows:
    rows, cols, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rows, cols, tokens


def _corners(
    grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """Longitude and latitude of the outlines of patches, shape (N, 5, 2)."""
    c = cols[:, None] + np.array([0, 1, 1, 0, 0])
    r = rows[:, None] + np.array([0, 0, 1, 1, 0])
    xs, ys = grid.transform @ (c.astype(float), r.astype(float))
    return lonlat.transform_to_lonlat(grid, xs, ys)


def _footprints(grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]) -> Any:
    return shapely.to_wkb(lonlat.outlines(_corners(grid, rows, cols)))


def _geo_metadata(grid: Grid) -> dict[str, Any]:
    """The 'geo' entry of GeoParquet 1.1."""
    # The patches along the four edges: an edge that is straight on the grid is not in degrees.
    inner = np.zeros(grid.shape, bool)
    inner[1:-1, 1:-1] = True
    box = lonlat.bounding_box(lonlat.extents(_corners(grid, *(~inner).nonzero())))
    # Footprints across 180 degrees are cut in two.
    cut = not -180 < box[0] < box[2] < 180
    return {
        'version': '1.1.0',
        'primary_column': 'geometry',
        'columns': {
            'geometry': {
                'encoding': 'WKB',
                'geometry_types': ['MultiPolygon', 'Polygon'] if cut else ['Polygon'],
                'crs': pyproj.CRS.from_epsg(4326).to_json_dict(),
                'bbox': list(box),
            }
        },
    }
