"""Search for similar places by cosine similarity of embeddings."""

from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from matplotlib.figure import Figure
from pyproj import Geod

from geofm import lonlat
from geofm.atomic import atomic_file
from geofm.maps.make.embeddings import BATCH_ROWS, EmbeddingTable, read_batches
from geofm.maps.make.windows import Floats
from geofm.maps.view.figure import draw_map

#: Drivers of the vector formats that places can be written to.
_DRIVERS = {'.geojson': 'GeoJSON', '.gpkg': 'GPKG'}


@dataclass(frozen=True)
class SearchResult:
    """Places that are similar to a query place.

    Attributes:
        places: One row per place. The first is the query place, followed by the others from most to
            least similar. Columns: rank (0 for the query place), similarity (cosine, -1 to 1),
            longitude and latitude of the centre, distance in metres from the query place, the dates
            of the table, row and col on the patch grid, and geometry, the footprint in EPSG:4326.
        similarity: Similarity of every patch to the query place, float32 on the patch grid; NaN
            where there is no patch.
        table: Metadata of the file.
        at: Longitude and latitude of the query place.
    """

    places: gpd.GeoDataFrame
    similarity: Floats
    table: EmbeddingTable
    at: tuple[float, float]

    def plot(self) -> Figure:
        """Draw the similarity of every patch, with numbered places.

        Returns:
            The figure.
        """
        title = f'Cosine similarity to {self.at[0]:.4f}, {self.at[1]:.4f}'
        marks = {
            str(row.rank): (row.col + 0.5, row.row + 0.5)
            for row in self.places.itertuples(index=False)
        }
        return draw_map(self.similarity, self.table.grid, title, 'cosine similarity', marks)

    def save(self, path: Path) -> None:
        """Write the places as GeoJSON or GeoPackage, or the figure of :meth:`plot` as PNG or PDF.

        Args:
            path: File to write. Its suffix determines the format.

        Raises:
            ValueError: If the suffix is unknown.
        """
        suffix = path.suffix.lower()
        with atomic_file(path) as part:
            if suffix in _DRIVERS:
                self.places.to_file(part, driver=_DRIVERS[suffix], layer='places')
            elif suffix in ('.png', '.pdf'):
                self.plot().savefig(part)
            else:
                raise ValueError(f'{path}: give a .geojson, .gpkg, .png or .pdf')


def search(path: Path, at: tuple[float, float], top: int = 10) -> SearchResult:
    """Find the patches whose embeddings are most similar to the embedding of a place.

    The file is read twice, batch by batch. Memory holds one number per patch.

    Args:
        path: GeoParquet of embeddings, as ``geofm map`` writes it.
        at: Longitude and latitude of the place.
        top: Number of similar places, not counting the place itself.

    Returns:
        The places.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has no embeddings, if *top* is not positive, or if the place lies outside
            the scene or has no data.
    """
    if top < 1:
        raise ValueError(f'top={top} is not positive')
    table = EmbeddingTable.read(path)
    row, col = lonlat.pixel_in(table.grid, *at, path)
    query = next(
        (
            batch.vectors[k]
            for batch in read_batches(path, table)
            if (k := batch.index_of(row, col)) is not None
        ),
        None,
    )
    if query is None:
        raise ValueError(f'{path}: the scene has no data at {at[0]}, {at[1]}')
    query = query / max(float(np.linalg.norm(query)), 1e-12)
    grid = table.grid
    similarity = np.full(grid.shape, np.nan, np.float32)
    for batch in read_batches(path, table):
        lengths = np.linalg.norm(batch.vectors, axis=1)
        similarity[batch.rows, batch.cols] = batch.vectors @ query / np.maximum(lengths, 1e-12)
    order = similarity.copy()
    # The query place comes first, regardless of rounding.
    order[row, col] = np.inf
    flat = np.nan_to_num(order, nan=-np.inf).ravel()
    known = int(np.isfinite(similarity).sum())
    best = np.argsort(-flat, kind='stable')[: min(top + 1, known)]
    return SearchResult(_places(path, table, best, similarity), similarity, table, at)


def _places(
    path: Path, table: EmbeddingTable, best: npt.NDArray[np.intp], similarity: Floats
) -> gpd.GeoDataFrame:
    """Read the rows of the file at some positions on the patch grid, in their order."""
    width = table.grid.width
    rank = {int(position): k for k, position in enumerate(best)}
    found: list[pa.RecordBatch] = []
    with pq.ParquetFile(path) as file:
        columns = [name for name in file.schema_arrow.names if name != 'embedding']
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            positions = batch.column('row').to_numpy().astype(np.intp) * width
            positions = positions + batch.column('col').to_numpy()
            found.append(batch.filter(pa.array(np.isin(positions, best))))
    frame = pa.Table.from_batches(found).to_pandas()
    geometry = gpd.GeoSeries(shapely.from_wkb(frame.pop('geometry')), crs='EPSG:4326')
    positions = frame['row'].to_numpy() * width + frame['col'].to_numpy()
    # Not the centroid of the footprint, which may have two parts on either side of 180 degrees.
    middles = table.grid.transform @ (frame['col'].to_numpy() + 0.5, frame['row'].to_numpy() + 0.5)
    centres = lonlat.transform_to_lonlat(table.grid, *middles)
    frame.insert(0, 'rank', [rank[int(position)] for position in positions])
    frame.insert(1, 'similarity', similarity.ravel()[positions])
    frame.insert(2, 'longitude', lonlat.wrap(centres[:, 0]))
    frame.insert(3, 'latitude', centres[:, 1])
    places = gpd.GeoDataFrame(frame, geometry=geometry).sort_values('rank', ignore_index=True)
    lon, lat = places['longitude'].to_numpy(), places['latitude'].to_numpy()
    _, _, distance = Geod(ellps='WGS84').inv(
        np.full_like(lon, lon[0]), np.full_like(lat, lat[0]), lon, lat
    )
    places.insert(4, 'distance', distance)
    return places
