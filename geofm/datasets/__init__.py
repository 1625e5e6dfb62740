"""Datasets in TorchGeo's style."""

from geofm.datasets.collate import pad_and_stack
from geofm.datasets.landcover import SampleLandCover
from geofm.datasets.sample import LAND_COVER, write_sample_data
from geofm.datasets.sen12mscrts import SEN12MSCRTS, EmptySplitError

__all__ = (
    'LAND_COVER',
    'SEN12MSCRTS',
    'EmptySplitError',
    'SampleLandCover',
    'pad_and_stack',
    'write_sample_data',
)
