"""What a reader gives: an open raster of any format."""

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
    """An open raster: the part of :class:`rasterio.io.DatasetReader` that is needed to read it.

    Attributes:
        name: Its address, for messages.
        driver: Name of the format.
        count: Number of bands.
        height: Number of rows.
        width: Number of columns.
        crs: CRS; None if it is not georeferenced.
        transform: Affine map from pixels to the CRS.
        dtypes: Pixel type of each band.
        descriptions: What the file says of each band.
        scales: Factor of each band's numbers.
        offsets: What is added to them after scaling.
        units: Unit of each band after scaling.
        nodatavals: Nodata value of each band.
        colorinterp: Meaning of each band as a colour; alpha is no data band.
        mask_flag_enums: Kinds of masks of each band.
        block_shapes: Rows and columns that are stored together, of each band.
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
        """Numbers of bands, counted from 1, of a window in whole pixels inside the raster."""

    def read_masks(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[np.uint8]:
        """Mask of a band, 0 where it has no data."""

    def tags(self, bidx: int = 0) -> dict[str, str]:
        """Further metadata of a band, or of the file."""

    def close(self) -> None:
        """Close the file."""


class Reader(Protocol):
    """A format of files. Adding one is a module with a reader, listed in ``readers.opening``."""

    def accepts(self, address: str) -> bool:
        """Tell by the name alone whether this reader is for an address.

        Args:
            address: Absolute path or address.

        Returns:
            Whether it is.
        """

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open a raster.

        Args:
            address: Absolute path or address.
            sensor: Key of the sensor to read, for files that hold several.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read; one line that names the file.
        """


def grid_of(source: Source) -> Grid | None:
    """Grid of a raster.

    Args:
        source: The raster.

    Returns:
        Its grid; None if it is not georeferenced.
    """
    if source.crs is None:
        return None
    return Grid(source.crs, source.transform, source.height, source.width)


def as_dataset(source: Source) -> DatasetReader:
    """Hand a source to a function that is made for rasterio's datasets.

    Args:
        source: The source.

    Returns:
        The same object.
    """
    return cast(DatasetReader, source)


class SourceView:
    """Some bands of a source, with numbers that mean something else than the file says.

    It is a :class:`Source` itself.
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
            bands: Indices of its bands, from 0.
            scale: Scale in place of the file's; the offset is then 0 if none is given.
            offset: Offset in place of the file's.
            unit: Unit in place of the file's.
            nodata: Nodata value in place of the file's.
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
        """Numbers of bands, as of :meth:`Source.read`."""
        return self._source.read(self._numbers(indexes), window=window)

    def read_masks(self, indexes: Any, *, window: Window | None = None) -> npt.NDArray[np.uint8]:
        """Mask of a band, as of :meth:`Source.read_masks`."""
        return self._source.read_masks(self._numbers(indexes), window=window)

    def tags(self, bidx: int = 0, ns: str | None = None) -> dict[str, str]:
        """Further metadata of a band, or of the file."""
        return self._source.tags(self._numbers(bidx) if bidx else 0)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def _numbers(self, indexes: Any) -> Any:
        """Numbers of the bands in the source."""
        if isinstance(indexes, int):
            return self._bands[indexes - 1] + 1
        return [self._bands[i - 1] + 1 for i in indexes]
