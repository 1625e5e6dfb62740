"""A table of rasters: one row per file, or per band of a file, of any sensors."""

from geofm.datasets.table.error import TableError
from geofm.datasets.table.observations import Observations
from geofm.datasets.table.raster_table import NO_TIME, RasterTable
from geofm.datasets.table.reading import read_observation
from geofm.datasets.table.scanning import open_table, scan_table

__all__ = [
    'NO_TIME',
    'Observations',
    'RasterTable',
    'TableError',
    'open_table',
    'read_observation',
    'scan_table',
]
