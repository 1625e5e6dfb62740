"""Table of rasters of any sensors, with one row per file or per band of a file."""

from geofm.datasets.table.address import file_of
from geofm.datasets.table.error import TableError
from geofm.datasets.table.indexing import Indexed, index_folder
from geofm.datasets.table.observations import Observations
from geofm.datasets.table.raster_table import NO_TIME, RasterTable
from geofm.datasets.table.reading import read_observation
from geofm.datasets.table.scanning import check_places, count_problems, open_table, scan_table
from geofm.datasets.table.stac import index_stac

__all__ = (
    'NO_TIME',
    'Indexed',
    'Observations',
    'RasterTable',
    'TableError',
    'check_places',
    'count_problems',
    'file_of',
    'index_folder',
    'index_stac',
    'open_table',
    'read_observation',
    'scan_table',
)
