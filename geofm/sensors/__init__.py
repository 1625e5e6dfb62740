"""Definitions of sensors: their bands, units and statistics.

All other code refers to bands by name. The order of the channels of a tensor is given by a list of
names.
"""

from geofm.sensors.builtin import DEM, LANDSAT, RGB, SENTINEL1, SENTINEL2, SENTINEL2_L2A
from geofm.sensors.channels import (
    BANDS,
    RGB_BANDS,
    BandError,
    band_indices,
    band_statistics,
    bands_of,
    canonical_bands,
    check_bands,
    check_channels,
    sensor_channels,
    sensor_of,
)
from geofm.sensors.plain import SensorError
from geofm.sensors.registry import (
    CHANNELS,
    DEFAULT_SENSORS,
    SENSORS,
    added_sensors,
    canonical_order,
    date_columns,
    load_sensors,
    reference_sensor,
    register_sensor,
    register_sensors,
    sensor,
)
from geofm.sensors.sensor import (
    Band,
    Drawing,
    Histogram,
    Quantity,
    Range,
    Sensor,
    SensorPhotometry,
)

__all__ = [
    'BANDS',
    'CHANNELS',
    'DEFAULT_SENSORS',
    'DEM',
    'LANDSAT',
    'RGB',
    'RGB_BANDS',
    'SENSORS',
    'SENTINEL1',
    'SENTINEL2',
    'SENTINEL2_L2A',
    'Band',
    'BandError',
    'Drawing',
    'Histogram',
    'Quantity',
    'Range',
    'Sensor',
    'SensorError',
    'SensorPhotometry',
    'added_sensors',
    'band_indices',
    'band_statistics',
    'bands_of',
    'canonical_bands',
    'canonical_order',
    'check_bands',
    'check_channels',
    'date_columns',
    'load_sensors',
    'reference_sensor',
    'register_sensor',
    'register_sensors',
    'sensor',
    'sensor_channels',
    'sensor_of',
]
