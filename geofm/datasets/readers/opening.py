"""Open rasters of any format: those of GDAL, HDF5 files, NumPy files and Zarr stores."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from geofm.datasets.readers.arrays import ArrayAddress, ArraySource, Group, layers_of, open_group
from geofm.datasets.readers.hdf5 import Hdf5Reader
from geofm.datasets.readers.source import Reader, Source
from geofm.rasters import open_raster
from geofm.sensors import SENSORS

# Images without a CRS are supported. Code that needs a CRS checks for it.
warnings.filterwarnings('ignore', category=NotGeoreferencedWarning, module=r'geofm\.rasters')


class RasterReader:
    """Reader of GeoTIFF and other formats of :func:`geofm.rasters.open_raster`, also remote.

    A file with ground control points instead of a transform, such as Sentinel-1 GRD, is warped onto
    a grid in their CRS.
    """

    def accepts(self, address: str) -> bool:
        """Accept any address.

        Args:
            address: Absolute path or address.

        Returns:
            True.
        """
        return True

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open a raster.

        Args:
            address: Absolute path or address.
            sensor: Key of the sensor, whose resampling method is used if the raster must be
                warped.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read.
        """
        src = open_raster(address, remote=True)
        gcps, crs = src.gcps
        if src.crs is not None or not gcps or crs is None:
            return cast(Source, src)
        # Unprojected scenes, e.g. in radar geometry, are warped onto the grid that GDAL suggests.
        method = Resampling.bilinear if sensor is None else Resampling[SENSORS[sensor].resampling]
        try:
            return _Warped(src, src_crs=crs, crs=crs, resampling=method, add_alpha=True)
        except BaseException:
            src.close()
            raise


class _Warped(WarpedVRT):
    """Raster that is warped on reading, and closed together with its file."""

    def __init__(self, src: DatasetReader, **options: Any) -> None:
        super().__init__(src, **options)
        self._file = src

    def close(self) -> None:
        """Close the raster and its file."""
        super().close()
        self._file.close()


class NpyReader:
    """Reader of images in ``.npy`` files: (H, W), (C, H, W) or (H, W, C), without CRS."""

    def accepts(self, address: str) -> bool:
        """Check whether this reader is responsible for an address.

        Args:
            address: Absolute path.

        Returns:
            Whether it ends in ``.npy``.
        """
        return address.lower().endswith('.npy')

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open an array.

        Args:
            address: Absolute path.
            sensor: Key of the sensor. The axis whose length is its number of bands is the band
                axis. If that is ambiguous, it is the first axis, unless the last one is shorter.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an array of numbers.
        """
        try:
            # Map the file, so that only the parts that are read are loaded. Pickled objects could
            # run code.
            array = np.load(address, mmap_mode='r', allow_pickle=False)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f'{address}: cannot be read as NPY ({error})') from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in 'biuf':
            raise ValueError(f'{address}: holds an array of {array.dtype}, not of numbers')
        known = None if sensor is None else SENSORS[sensor]
        return ArraySource(address, 'NPY', layers_of(_Plain(array), (), known, address))


class _Plain:
    """Array without attributes."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.attrs: Mapping[str, Any] = {}

    def __getitem__(self, key: Any) -> Any:
        return self._array[key]


class ZarrReader:
    """Reader of arrays in ``.zarr`` folders and ``.zarr.zip`` files."""

    def accepts(self, address: str) -> bool:
        """Check whether this reader is responsible for an address.

        Args:
            address: Absolute path or address.

        Returns:
            Whether it is a Zarr store, or an array in one.
        """
        start = address.lower()
        return start.startswith('zarr:') or start.endswith(('.zarr', '.zarr.zip'))

    def open_source(self, address: str, sensor: str | None = None) -> Source:
        """Open arrays of a store.

        Args:
            address: The store, or ``ZARR:"store.zarr.zip":/array:3`` for index 3 of the first
                dimension of an array.
            sensor: Name of the sensor to read.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such store.
            ValueError: If it cannot be read.
        """
        # Importing zarr takes a second.
        import zarr
        from zarr.storage import LocalStore, ZipStore

        where = ArrayAddress.parse(address)
        path = Path(where.file)
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file')
        store: Any = None
        try:
            store = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode='r')
            group = zarr.open(store, mode='r')
        except Exception as error:
            # Damaged stores raise about a dozen types of error.
            if store is not None:
                store.close()
            raise ValueError(f'{path}: cannot be read as Zarr ({error})') from error
        try:
            members: Any = {'bands': group} if isinstance(group, zarr.Array) else group
            wrapped = _Members(members) if isinstance(members, dict) else members
            return open_group(cast(Group, wrapped), address, where, sensor, 'Zarr', store)
        except BaseException:
            store.close()
            raise


class _Members(dict[str, Any]):
    """Store that consists of one array, as a group."""

    attrs: dict[str, Any] = {}  # noqa: RUF012 - it is never modified


#: Readers in the order in which they are tried. The last one accepts every address.
READERS: tuple[Reader, ...] = (NpyReader(), ZarrReader(), Hdf5Reader(), RasterReader())


def open_source(address: str, sensor: str | None = None) -> Source:
    """Open a raster of any format.

    Args:
        address: Absolute path or address.
        sensor: Key of the sensor to read, for files with several sensors.

    Returns:
        The open raster, which the caller must close.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read. The message is one line that names the file.
    """
    reader = next(reader for reader in READERS if reader.accepts(address))
    return reader.open_source(address, sensor)
