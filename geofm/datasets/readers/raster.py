"""Rasters that GDAL reads."""

import warnings
from typing import cast

from rasterio.errors import NotGeoreferencedWarning

from geofm.datasets.readers.source import Source
from geofm.rasters import open_raster

# Pictures without a CRS are read on purpose; whoever needs one checks for it.
warnings.filterwarnings('ignore', category=NotGeoreferencedWarning, module=r'geofm\.rasters')


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
