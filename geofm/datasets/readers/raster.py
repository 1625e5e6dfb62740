"""Rasters that GDAL reads."""

import warnings
from typing import Any, cast

from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT

from geofm.datasets.readers.source import Source
from geofm.rasters import open_raster
from geofm.sensors import SENSORS

# Pictures without a CRS are read on purpose; whoever needs one checks for it.
warnings.filterwarnings('ignore', category=NotGeoreferencedWarning, module=r'geofm\.rasters')


class RasterReader:
    """GeoTIFF and whatever else :func:`geofm.rasters.open_raster` opens, also from servers.

    A file with ground control points in place of a transform, as of Sentinel-1 GRD, is warped onto
    a grid of their CRS.
    """

    def accepts(self, address: str) -> bool:
        """Any address.

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
            sensor: Key of its sensor, whose method of resampling is used if it must be warped.

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
        # Scenes in radar geometry or unprojected: on the grid that GDAL suggests for them.
        method = Resampling.bilinear if sensor is None else Resampling[SENSORS[sensor].resampling]
        try:
            return _Warped(src, src_crs=crs, crs=crs, resampling=method, add_alpha=True)
        except BaseException:
            src.close()
            raise


class _Warped(WarpedVRT):
    """A raster that is warped as it is read, and closed with its file."""

    def __init__(self, src: DatasetReader, **options: Any) -> None:
        super().__init__(src, **options)
        self._file = src

    def close(self) -> None:
        """Close it and its file."""
        super().close()
        self._file.close()
