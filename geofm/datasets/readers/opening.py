"""Open rasters of any format."""

from geofm.datasets.readers.hdf5 import Hdf5Reader
from geofm.datasets.readers.npy import NpyReader
from geofm.datasets.readers.raster import RasterReader
from geofm.datasets.readers.source import Reader, Source
from geofm.datasets.readers.zarr_store import ZarrReader

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
