"""Making maps of scenes: attention, features, predictions of fine-tuned tasks, and change."""

from geofm.maps.make.change import map_change
from geofm.maps.make.predict import (
    ClassProduct,
    Prediction,
    PredictOptions,
    predict_files,
    predict_table,
)
from geofm.maps.make.products import map_table
from geofm.maps.make.tables import Part, TableRun, own_device

__all__ = (
    'ClassProduct',
    'Part',
    'PredictOptions',
    'Prediction',
    'TableRun',
    'map_change',
    'map_table',
    'own_device',
    'predict_files',
    'predict_table',
)
