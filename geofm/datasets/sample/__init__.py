"""Generated sample data: landscapes, and their scenes in several layouts of files."""

from geofm.datasets.sample.classes import LAND_COVER, LandCoverClass
from geofm.datasets.sample.plan import DEFAULT_ROIS
from geofm.datasets.sample.scenes import write_sample_scenes
from geofm.datasets.sample.writer import SampleDataSummary, write_sample_data

__all__ = (
    'DEFAULT_ROIS',
    'LAND_COVER',
    'LandCoverClass',
    'SampleDataSummary',
    'write_sample_data',
    'write_sample_scenes',
)
