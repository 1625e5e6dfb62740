"""Scenes to map: rasters of any sensors, STAC items and tables of rasters, read on one grid."""

from geofm.maps.scene.placement import Placement
from geofm.maps.scene.scene import (
    CACHE_BYTES,
    Imagery,
    Missing,
    Scene,
    SensorRaster,
    bands_option,
    files_by_sensor,
    option,
)
from geofm.maps.scene.stac import Item, read_item
from geofm.maps.scene.table import BandLabels, TableScene, TableScenes

__all__ = (
    'CACHE_BYTES',
    'BandLabels',
    'Imagery',
    'Item',
    'Missing',
    'Placement',
    'Scene',
    'SensorRaster',
    'TableScene',
    'TableScenes',
    'bands_option',
    'files_by_sensor',
    'option',
    'read_item',
)
