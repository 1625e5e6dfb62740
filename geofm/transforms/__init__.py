"""Transforms of batches, on the device of the batch."""

from geofm.transforms.masks import block_masks
from geofm.transforms.multicrop import N_GLOBAL, Crops, MultiCrop
from geofm.transforms.photometry import Photometry, PhotometryArgs
from geofm.transforms.picture import PICTURE_WHITE, Picture, Standardize
from geofm.transforms.resample import crop_and_resize
from geofm.transforms.statistics import NO_STATISTICS, InputStatistics, Normalize, statistics_of

__all__ = (
    'NO_STATISTICS',
    'N_GLOBAL',
    'PICTURE_WHITE',
    'Crops',
    'InputStatistics',
    'MultiCrop',
    'Normalize',
    'Photometry',
    'PhotometryArgs',
    'Picture',
    'Standardize',
    'block_masks',
    'crop_and_resize',
    'statistics_of',
)
