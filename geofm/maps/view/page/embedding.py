"""Embeddings of patches in a compact form for the browser."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from rasterio.io import DatasetReader

from geofm.grid import Grid
from geofm.maps.make.embedding_files import read_vectors, strip_windows
from geofm.maps.make.embeddings import unit_vectors
from geofm.maps.make.windows import Floats
from geofm.rasters import open_raster

#: Maximum size of the vectors of a page in bytes, which a phone can still open. Larger embeddings
#: are projected to fewer dimensions.
MOST_BYTES = 48 * 2**20


@dataclass(frozen=True)
class EmbeddingGrid:
    """Vectors of 8-bit integers, one per patch of a grid.

    The cosine of two vectors does not depend on their lengths, so each vector is scaled
    separately: its component of largest magnitude becomes 127 or -127.

    Attributes:
        vectors: int8 of shape (rows, columns, D) in -127..127; all 0 where there is no data.
        grid: Grid of the patches.
        kept: Fraction of the squared length of the vectors that was kept, in (0, 1]: 1 unless they
            were projected to fewer dimensions.
    """

    vectors: npt.NDArray[np.int8]
    grid: Grid
    kept: float = 1

    @classmethod
    def of(cls, vectors: Floats, grid: Grid) -> Self:
        """Quantise vectors.

        Args:
            vectors: Vectors of shape (rows, columns, D), not finite where there is no data.
            grid: Grid of the patches.

        Returns:
            The embedding.

        Raises:
            ValueError: If the grid has another shape.
        """
        if vectors.shape[:2] != grid.shape:
            raise ValueError(f'vectors of shape {vectors.shape} on a grid of shape {grid.shape}')
        return cls(_quantise(vectors), grid)

    @classmethod
    def read(cls, path: Path, most_bytes: int = MOST_BYTES) -> Self:
        """Read an embedding, strip by strip.

        Args:
            path: Raster of patches with one band per dimension: floats, or integers with scales
                and offsets in the file. A patch has no data where any band is nodata or NaN.
            most_bytes: Maximum size of the vectors in bytes. If there are more dimensions than
                this allows, the unit vectors are projected onto the leading eigenvectors of their
                second moment, which preserves their dot products best.

        Returns:
            The embedding.

        Raises:
            ValueError: If the raster has no CRS, or no patch has data.
        """
        with open_raster(path) as src:
            grid = Grid.of(src)
            basis, kept = None, 1.0
            dims = min(src.count, max(1, most_bytes // (grid.height * grid.width)))
            if dims < src.count:
                basis, kept = _basis(src, dims)
            strips = (
                _quantise(strip if basis is None else _units(strip) @ basis)
                for strip in _strips(src)
            )
            vectors = np.concatenate([*strips])
        if not vectors.any():
            raise ValueError(f'{path}: no patch has data')
        return cls(vectors, grid, kept)


def _strips(src: DatasetReader) -> Iterator[Floats]:
    """Read rows of patches from top to bottom, (rows, columns, D); NaN where there is no data."""
    for window in strip_windows(src):
        yield read_vectors(src, window).transpose(1, 2, 0)


def _units(vectors: Floats) -> Floats:
    """Scale vectors to unit length; those without data become 0."""
    return np.nan_to_num(unit_vectors(vectors, -1))


def _basis(src: DatasetReader, dims: int) -> tuple[Floats, float]:
    """Return the leading eigenvectors (D, dims) of the unit vectors' second moment.

    Also return the fraction of the second moment along them.
    """
    moment = np.zeros((src.count, src.count))
    for strip in _strips(src):
        units = _units(strip).reshape(-1, src.count)
        moment += units.T @ units
    values, directions = np.linalg.eigh(moment)
    kept = float(values[-dims:].sum() / max(values.sum(), 1e-12))
    return directions[:, -dims:].astype(np.float32), kept


def _quantise(vectors: Floats) -> npt.NDArray[np.int8]:
    known = np.isfinite(vectors).all(axis=-1, keepdims=True)
    vectors = np.where(known, vectors, 0)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    scaled = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest > 0)
    return np.rint(127 * scaled).astype(np.int8)
