"""Generated sample data: landscapes, and their scenes in several layouts of files."""

from geofm.sample.classes import LAND_COVER, LandCoverClass
from geofm.sample.plan import DEFAULT_ROIS
from geofm.sample.scenes import write_sample_scenes
from geofm.sample.writer import SCENES, SampleDataSummary, land_cover_path, write_sample_data

__all__ = (
    'DEFAULT_ROIS',
    'LAND_COVER',
    'SCENES',
    'LandCoverClass',
    'SampleDataSummary',
    'land_cover_path',
    'write_sample_data',
    'write_sample_scenes',
)
