"""Rasters that GDAL reads."""

from typing import cast

from geofm.datasets.readers.source import Source
from geofm.rasters import open_raster


class RasterReader:
    """GeoTIFF and whatever else :func:`geofm.rasters.open_raster` opens."""

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
            sensor: Not needed.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read.
        """
        return cast(Source, open_raster(address))
