"""Samples of a table of rasters: windows of scenes, matched between sensors by place and date."""

from geofm.datasets.archive.archive_table import Archive
from geofm.datasets.archive.building import available_bands
from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.archive.labelled import LabelledArchive, Target
from geofm.datasets.archive.mapping import open_archive
from geofm.datasets.archive.masked import IGNORE, MaskedArchive, TargetArchive
from geofm.datasets.archive.scene_files import write_scene
from geofm.datasets.archive.splits import Blocks
from geofm.datasets.archive.statistics import table_statistics
from geofm.datasets.archive.windowing import Edge
from geofm.datasets.splitting import Split

__all__ = (
    'IGNORE',
    'Archive',
    'Blocks',
    'Edge',
    'LabelledArchive',
    'MaskedArchive',
    'RasterArchive',
    'Split',
    'Target',
    'TargetArchive',
    'available_bands',
    'open_archive',
    'table_statistics',
    'write_scene',
)
