"""Embeddings of patches as GeoParquet, one row per patch."""

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

#: Data type of the vectors; 'int8' has a scale for each dimension.
Precision = Literal['float32', 'float16', 'int8']

#: Minimum number of rows of a row group.
_GROUP_ROWS = 8_192

#: Number of rows that are read at once.
BATCH_ROWS = 16_384


def dimension_scales(strips: Iterable[Strip]) -> Floats:
    """Return the scale of each dimension for int8: the largest magnitude becomes 127.

    Args:
        strips: Patch tokens, (D, rows, columns) each; NaN where there is no data.

    Returns:
        Scales of shape (D,). A value is the stored number times its scale.
    """
    largest = np.zeros(1, np.float32)
    for strip in strips:
        magnitudes = np.abs(strip.values).reshape(len(strip.values), -1)
        # Not nanmax, which warns of strips without data.
        largest = np.maximum(largest, np.where(np.isnan(magnitudes), 0, magnitudes).max(axis=1))
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


def unit_vectors(vectors: Floats, axis: int) -> Floats:
    """Scale vectors to unit length.

    Args:
        vectors: Vectors along one axis of an array.
        axis: The axis.

    Returns:
        Vectors of length 1, float32; NaN where a vector holds NaN or has no length.
    """
    lengths = np.linalg.norm(vectors, axis=axis, keepdims=True)
    lengths[lengths == 0] = np.nan
    return (vectors / lengths).astype(np.float32, copy=False)


@dataclass(frozen=True)
class EmbeddingTable:
    """Metadata of a GeoParquet file of embeddings.

    Attributes:
        grid: Grid of the patches. The columns 'row' and 'col' are positions in it.
        scales: Scale of each dimension if vectors are int8, otherwise None.
        tags: Model, hash of its weights, and other tags.
    """

    grid: Grid
    scales: tuple[float, ...] | None
    tags: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the metadata of a file.

        Args:
            path: The file.

        Returns:
            Grid, scales and tags.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not a table of embeddings written by geofm.
        """
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        try:
            about = json.loads((pq.read_schema(path).metadata or {})[b'geofm'])
        except (pa.ArrowInvalid, KeyError) as error:
            raise ValueError(
                f'{path}: not a table of embeddings; give a *_embedding.parquet written by '
                '`geofm map` or `geofm embed`'
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
        """Return the index of the patch at a position; None if it is not in this batch."""
        found = np.flatnonzero((self.rows == row) & (self.cols == col))
        return int(found[0]) if len(found) else None


def read_batches(path: Path, table: EmbeddingTable) -> Iterator[Batch]:
    """Read the embeddings of a file batch by batch.

    Args:
        path: The file.
        table: Its metadata.

    Yields:
        Batches of rows, in the order of the file.
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

    The columns are the footprint of a patch ('geometry', EPSG:4326, split at 180 degrees), its
    'row' and 'col' on the patch grid, the day of acquisition of each sensor ('date_s1', 'date_s2';
    null if unknown), and its vector ('embedding', a list of fixed size). Patches without data have
    no row. The entry 'geofm' of the file's metadata holds the patch grid, the scales of int8 and
    the tags, as JSON.

    Args:
        path: File to write.
        grid: Grid of the patches.
        strips: Patch tokens, (D, rows, columns) each, from top to bottom.
        precision: Data type of the vectors.
        scales: Scale of each dimension for 'int8'. A value is the stored number times its scale.
        dates: Day of acquisition by sensor.
        tags: Model, hash of its weights, and other tags.

    Returns:
        Number of rows.

    Raises:
        ValueError: If *scales* are given for floats, or missing for int8.
    """
    if (precision == 'int8') != (scales is not None):
        raise ValueError('scales are needed for int8, and for int8 only')
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
    """Yield the rows, columns and tokens of the patches with data."""
    top = 0
    for part in parts:
        for strip in part:
            rows, cols = np.isfinite(strip.values).all(axis=0).nonzero()
            yield rows + top, cols, strip.values[:, rows, cols].T
            top += strip.values.shape[1]


def _groups(parts: Iterable[_Rows]) -> Iterator[_Rows]:
    """Join strips into row groups of at least the minimum size."""
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
    """Return longitude and latitude of the outlines of patches, of shape (N, 5, 2)."""
    c = cols[:, None] + np.array([0, 1, 1, 0, 0])
    r = rows[:, None] + np.array([0, 0, 1, 1, 0])
    xs, ys = grid.transform @ (c.astype(float), r.astype(float))
    return lonlat.transform_to_lonlat(grid, xs, ys)


def _footprints(grid: Grid, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]) -> Any:
    return shapely.to_wkb(lonlat.outlines(_corners(grid, rows, cols)))


def _geo_metadata(grid: Grid) -> dict[str, Any]:
    """Return the 'geo' entry of GeoParquet 1.1."""
    # All patches along the edges: a straight edge of the grid is curved in degrees.
    inner = np.zeros(grid.shape, bool)
    inner[1:-1, 1:-1] = True
    box = lonlat.bounding_box(lonlat.extents(_corners(grid, *(~inner).nonzero())))
    # Footprints across 180 degrees are split in two.
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
