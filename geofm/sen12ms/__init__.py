"""Conventions of SEN12MS-CR-TS and SEN12MS-CR: file names, ROIs and official splits."""

from geofm.sen12ms.names import (
    LARGEST_NUMBER,
    PIXEL_SIZE,
    TIME_STEP,
    PairKey,
    PatchName,
    SceneName,
)
from geofm.sen12ms.regions import (
    REGIONS,
    ROIS,
    SEN12MSCR_TEST_ROIS,
    SEN12MSCR_VAL_ROIS,
    TEST_ROIS,
    VAL_ROIS,
    Roi,
    region_of,
    sen12mscr_split_of,
    split_of,
)

__all__ = (
    'LARGEST_NUMBER',
    'PIXEL_SIZE',
    'REGIONS',
    'ROIS',
    'SEN12MSCR_TEST_ROIS',
    'SEN12MSCR_VAL_ROIS',
    'TEST_ROIS',
    'TIME_STEP',
    'VAL_ROIS',
    'PairKey',
    'PatchName',
    'Roi',
    'SceneName',
    'region_of',
    'sen12mscr_split_of',
    'split_of',
)
