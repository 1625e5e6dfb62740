"""Protocols of open rasters and of their readers."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.grid import Grid


class Source(Protocol):
    """Open raster: the part of :class:`rasterio.io.DatasetReader` that is needed to read it.

    Attributes:
        name: Address, for messages.
        driver: Name of the format.
        count: Number of bands.
        height: Number of rows.
        width: Number of columns.
        crs: CRS; None if it is not georeferenced.
        transform: Affine map from pixels to the CRS.
        dtypes: Data type of each band.
        descriptions: Description of each band in the file.
        scales: Factor of the stored numbers of each band.
        offsets: Offset of each band, added after scaling.
        units: Unit of each band after scaling.
        nodatavals: Nodata value of each band.
        colorinterp: Colour interpretation of each band. An alpha band is not a data band.
        mask_flag_enums: Mask flags of each band.
        block_shapes: Rows and columns of the storage blocks of each band.
    """

    name: str
    driver: str
    count: int
    height: int
    width: int
    crs: CRS | None
    transform: Affine
    dtypes: Sequence[str]
    descriptions: Sequence[str | None]
    scales: Sequence[float]
    offsets: Sequence[float]
    units: Sequence[str | None]
    nodatavals: Sequence[float | None]
    colorinterp: Sequence[ColorInterp]
    mask_flag_enums: Sequence[Sequence[MaskFlags]]
    block_shapes: Sequence[tuple[int, int]]

    def read(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[Any]:
        """Read the numbers of bands, counted from 1, in a window of whole pixels."""

    def read_masks(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[np.uint8]:
        """Read the mask of a band, 0 where it has no data."""

    def tags(self, bidx: int = 0) -> dict[str, str]:
        """Return further metadata of a band, or of the file."""

    def close(self) -> None:
        """Close the file."""


class Reader(Protocol):
    """Reader of a file format. To add one, write a module, and list it in ``readers.opening``."""

    def accepts(self, address: str) -> bool:
        """Check by the name alone whether this reader is responsible for an address.

        Args:
            address: Absolute path or address.

        Returns:
            Whether it is.
        """

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open a raster.

        Args:
            address: Absolute path or address.
            sensor: Key of the sensor to read, for files with several sensors.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read. The message is one line that names the file.
        """


def grid_of(source: Source) -> Grid | None:
    """Return the grid of a raster.

    Args:
        source: The raster.

    Returns:
        Its grid; None if it is not georeferenced.
    """
    if source.crs is None:
        return None
    return Grid(source.crs, source.transform, source.height, source.width)


def as_dataset(source: Source) -> DatasetReader:
    """Cast a source, for functions that are typed for rasterio's datasets.

    Args:
        source: The source.

    Returns:
        The same object.
    """
    return cast(DatasetReader, source)


class SourceView:
    """Selected bands of a source, with other metadata than the file has.

    A view is a :class:`Source` itself.
    """

    def __init__(
        self,
        source: Source,
        bands: Sequence[int],
        scale: float | None = None,
        offset: float | None = None,
        unit: str | None = None,
        nodata: float | None = None,
    ) -> None:
        """Initialize a new SourceView instance.

        Args:
            source: The source.
            bands: Indices of the selected bands, from 0.
            scale: Scale that replaces that of the file. The offset is then 0 unless it is given.
            offset: Offset that replaces that of the file.
            unit: Unit that replaces that of the file.
            nodata: Nodata value that replaces that of the file.
        """
        self._source, self._bands = source, list(bands)
        for name in ('name', 'driver', 'height', 'width', 'crs', 'transform'):
            setattr(self, name, getattr(source, name))
        for name in ('dtypes', 'descriptions', 'scales', 'offsets', 'units', 'nodatavals'):
            setattr(self, name, [getattr(source, name)[i] for i in bands])
        self.colorinterp = [source.colorinterp[i] for i in bands]
        self.block_shapes = [source.block_shapes[i] for i in bands]
        self.mask_flag_enums = [source.mask_flag_enums[i] for i in bands]
        self.count = n = len(self._bands)
        if scale is not None:
            self.scales, self.offsets, self.units = [scale] * n, [0.0] * n, [None] * n
        if offset is not None:
            self.offsets = [offset] * n
        if unit is not None:
            self.units = [unit] * n
        if nodata is not None:
            self.nodatavals = [nodata] * n

    name: str
    driver: str
    height: int
    width: int
    crs: CRS | None
    transform: Affine
    dtypes: Sequence[str]
    descriptions: Sequence[str | None]
    scales: Sequence[float]
    offsets: Sequence[float]
    units: Sequence[str | None]
    nodatavals: Sequence[float | None]
    colorinterp: Sequence[ColorInterp]
    mask_flag_enums: Sequence[Sequence[MaskFlags]]
    block_shapes: Sequence[tuple[int, int]]

    def read(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[Any]:
        """Read the numbers of bands, see :meth:`Source.read`."""
        return self._source.read(self._numbers(indexes), window=window)

    def read_masks(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[np.uint8]:
        """Read the mask of a band, see :meth:`Source.read_masks`."""
        return self._source.read_masks(self._numbers(indexes), window=window)

    def tags(self, bidx: int = 0, ns: str | None = None) -> dict[str, str]:
        """Return further metadata of a band, or of the file."""
        return self._source.tags(self._numbers(bidx) if bidx else 0)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _numbers(self, indexes: Any) -> Any:
        """Return the numbers of bands in the source."""
        if isinstance(indexes, int):
            return self._bands[indexes - 1] + 1
        return [self._bands[i - 1] + 1 for i in indexes]
