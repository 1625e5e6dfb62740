"""Transforms of batches, on the device of the batch."""

from geofm.transforms.masks import block_masks
from geofm.transforms.multicrop import Crops, MultiCrop
from geofm.transforms.normalize import Normalize
from geofm.transforms.photometry import Photometry
from geofm.transforms.resample import crop_and_resize

__all__ = ('Crops', 'MultiCrop', 'Normalize', 'Photometry', 'block_masks', 'crop_and_resize')
