"""Datasets in TorchGeo's style."""

from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.collate import pad_and_stack
from geofm.datasets.eurosat_rgb import EuroSATRGB
from geofm.datasets.landcover import SampleLandCover
from geofm.datasets.multidate import MultiDate
from geofm.datasets.named_bands import NamedBands
from geofm.datasets.pairs.dataset import EmptySplitError
from geofm.datasets.satlas import SatlasLandCover
from geofm.datasets.sen12mscr import SEN12MSCR
from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.sample import LAND_COVER, write_sample_data, write_sample_scenes

__all__ = (
    'LAND_COVER',
    'SEN12MSCR',
    'SEN12MSCRTS',
    'EmptySplitError',
    'EuroSATRGB',
    'MultiDate',
    'NamedBands',
    'RasterArchive',
    'SampleLandCover',
    'SatlasLandCover',
    'pad_and_stack',
    'write_sample_data',
    'write_sample_scenes',
)
