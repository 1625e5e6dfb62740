"""Reading files of embeddings written by ``geofm embed``: GeoParquet, or a raster of patches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from rasterio.io import DatasetReader
from rasterio.windows import Window

from geofm.grid import Grid
from geofm.maps.make.embeddings import Batch, EmbeddingTable, read_batches
from geofm.maps.make.windows import Floats
from geofm.rasters import open_raster

#: End of the stems of files of embeddings.
END = '_embedding'

#: Approximate maximum size in bytes of the vectors that are read at once.
_STRIP_BYTES = 32 * 2**20


def check_embedding(src: DatasetReader) -> None:
    """Check that a raster is an embedding, and not another product of a model.

    Args:
        src: The raster.

    Raises:
        ValueError: If it is not an embedding, or if its tags do not identify the model.
    """
    tags = src.tags()
    # Embeddings of earlier versions have no tag 'product'.
    product = tags.get('product', 'embedding' if END in Path(src.name).name else 'none')
    if product != 'embedding' or 'weights_sha256' not in tags:
        raise ValueError(
            f'{src.name}: not an embedding, or its model is unknown; give a *{END}.tif written by '
            '`geofm embed`'
        )


def strip_windows(src: DatasetReader) -> list[Window]:
    """Divide a raster of embeddings into windows of whole rows that fit into memory.

    Args:
        src: Raster of patches with one band per dimension.

    Returns:
        Windows from top to bottom. They depend only on the shape and the number of bands.
    """
    rows = max(1, _STRIP_BYTES // (4 * src.count * src.width))
    return [
        Window(0, top, src.width, min(rows, src.height - top)) for top in range(0, src.height, rows)
    ]


def read_vectors(src: DatasetReader, window: Window) -> Floats:
    """Read the embeddings of a window of a raster.

    Args:
        src: Raster of patches with one band per dimension: floats, or integers with scales and
            offsets in the file.
        window: The window.

    Returns:
        Embeddings (D, rows, columns), float32; NaN in the bands where the file has no data.
    """
    scales, offsets = (np.array(v, np.float32)[:, None, None] for v in (src.scales, src.offsets))
    values = src.read(window=window, masked=True, out_dtype='float32') * scales + offsets
    vectors: Floats = values.filled(np.nan)
    return vectors


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings of a scene.

    Attributes:
        path: The file.
        table: Patch grid, scales and tags.
        dimensions: Length of an embedding.
    """

    path: Path
    table: EmbeddingTable
    dimensions: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the metadata of a file.

        Args:
            path: ``*_embedding.parquet`` or ``*_embedding.tif`` written by ``geofm embed``.

        Returns:
            The file of embeddings.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it has no embeddings, or if its tags do not identify the model.
        """
        if path.suffix.lower() == '.tif':
            with open_raster(path) as src:
                check_embedding(src)
                scales = None if set(src.scales) == {1.0} else tuple(src.scales)
                found = cls(path, EmbeddingTable(Grid.of(src), scales, src.tags()), src.count)
        else:
            table = EmbeddingTable.read(path)
            batch = next(read_batches(path, table), None)
            if batch is None:
                raise ValueError(f'{path}: no patch has an embedding')
            found = cls(path, table, batch.vectors.shape[1])
        if 'weights_sha256' not in found.table.tags:
            raise ValueError(
                f'{path}: the model of its embeddings is unknown; give a *_embedding.parquet or '
                '.tif written by `geofm embed`'
            )
        return found

    @property
    def stem(self) -> str:
        """Name of the scene."""
        return self.path.stem.removesuffix(END)

    @property
    def grid(self) -> Grid:
        """Grid of the patches."""
        return self.table.grid

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights of the model."""
        return self.table.tags['weights_sha256']

    def batches(self) -> Iterator[Batch]:
        """Read the embeddings of the patches with data, batch by batch."""
        if self.path.suffix.lower() == '.tif':
            yield from self._tif_batches()
            return
        height, width = self.grid.shape
        for batch in read_batches(self.path, self.table):
            inside = (batch.rows >= 0) & (batch.rows < height)
            inside &= (batch.cols >= 0) & (batch.cols < width)
            if not inside.all():
                raise ValueError(f'{self.path}: damaged: it has patches outside its grid')
            known = np.isfinite(batch.vectors).all(axis=1)
            rows, cols, vectors = batch
            yield batch if known.all() else Batch(rows[known], cols[known], vectors[known])

    def at(self, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]) -> Floats:
        """Read the embeddings at some positions.

        Args:
            rows: Rows on the patch grid (N,).
            cols: Columns on the patch grid (N,).

        Returns:
            Embeddings (N, D); NaN where there is none.
        """
        where = np.full(self.grid.shape, -1, np.intp)
        where[rows, cols] = np.arange(len(rows))
        found = np.full((len(rows), self.dimensions), np.nan, np.float32)
        for batch in self.batches():
            index = where[batch.rows, batch.cols]
            found[index[index >= 0]] = batch.vectors[index >= 0]
        return found

    def _tif_batches(self) -> Iterator[Batch]:
        with open_raster(self.path) as src:
            for window in strip_windows(src):
                values = read_vectors(src, window)
                rows, cols = np.isfinite(values).all(axis=0).nonzero()
                yield Batch(rows + window.row_off, cols, values[:, rows, cols].T)
