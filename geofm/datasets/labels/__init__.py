"""Labels from files of polygons, points or pixels, on any grid."""

from geofm.datasets.labels.reading import (
    LabelGrid,
    LabelPoints,
    open_labels,
    read_labels,
    read_points,
)
from geofm.datasets.labels.source import LabelError, LabelSource, check_values
from geofm.datasets.labels.vector import VectorLabels

__all__ = (
    'LabelError',
    'LabelGrid',
    'LabelPoints',
    'LabelSource',
    'VectorLabels',
    'check_values',
    'open_labels',
    'read_labels',
    'read_points',
)
