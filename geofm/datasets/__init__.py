"""Datasets in TorchGeo's style."""

from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.collate import pad_and_stack, stays_on_host, tensors_to
from geofm.datasets.eurosat_rgb import EuroSATRGB
from geofm.datasets.files import files_of
from geofm.datasets.footprints import SEARCH_CRS
from geofm.datasets.landcover import SampleLandCover
from geofm.datasets.layouts import find_layout
from geofm.datasets.multidate import MultiDate
from geofm.datasets.named_bands import NamedBands, S1Unit, wanted_bands
from geofm.datasets.pairs.dataset import EmptySplitError
from geofm.datasets.plot import colours, compose, drawing_order, stretch
from geofm.datasets.satlas import SatlasLandCover
from geofm.datasets.seeded import Seeded, Visit
from geofm.datasets.sen12mscr import SEN12MSCR, Sky
from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.datasets.shards import (
    INDEX,
    SHARD_BYTES,
    ShardError,
    Shards,
    is_remote,
    upload_shards,
    write_shards,
)
from geofm.datasets.splitting import Split, SplitRule, split_tree
from geofm.datasets.statistics import (
    BandStatistics,
    dataset_statistics,
    read_statistics,
    write_statistics,
)
from geofm.datasets.windows import RandomWindows
from geofm.sample import LAND_COVER, write_sample_data, write_sample_scenes

__all__ = (
    'INDEX',
    'LAND_COVER',
    'SEARCH_CRS',
    'SEN12MSCR',
    'SEN12MSCRTS',
    'SHARD_BYTES',
    'BandStatistics',
    'EmptySplitError',
    'EuroSATRGB',
    'MultiDate',
    'NamedBands',
    'RandomWindows',
    'RasterArchive',
    'S1Unit',
    'SampleLandCover',
    'SatlasLandCover',
    'Seeded',
    'ShardError',
    'Shards',
    'Sky',
    'Split',
    'SplitRule',
    'Visit',
    'colours',
    'compose',
    'dataset_statistics',
    'drawing_order',
    'files_of',
    'find_layout',
    'is_remote',
    'pad_and_stack',
    'read_statistics',
    'split_tree',
    'stays_on_host',
    'stretch',
    'tensors_to',
    'upload_shards',
    'wanted_bands',
    'write_sample_data',
    'write_sample_scenes',
    'write_shards',
    'write_statistics',
)
