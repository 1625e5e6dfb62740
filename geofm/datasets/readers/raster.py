"""Read rasters with GDAL."""

import warnings
from typing import Any, cast

from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from geofm.datasets.readers.source import Source
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
