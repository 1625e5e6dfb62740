"""Generated sample data in the layout of SEN12MS-CR-TS: a landscape, its scenes and its files."""

from geofm.datasets.sample.classes import LAND_COVER, LandCoverClass
from geofm.datasets.sample.plan import DEFAULT_ROIS
from geofm.datasets.sample.writer import SampleDataSummary, write_sample_data

__all__ = (
    'DEFAULT_ROIS',
    'LAND_COVER',
    'LandCoverClass',
    'SampleDataSummary',
    'write_sample_data',
)
