"""Labelled data for evaluation: the splits of any data module, with bands matched by name."""

from geofm.evaluation.data.labelled import (
    IGNORE,
    SPLITS,
    LabelledData,
    Split,
    Task,
    class_labels,
    class_mask,
    labelled_data,
    number_of_classes,
)
from geofm.evaluation.data.naming import innermost
from geofm.evaluation.data.paired import PairedDataModule

__all__ = (
    'IGNORE',
    'SPLITS',
    'LabelledData',
    'PairedDataModule',
    'Split',
    'Task',
    'class_labels',
    'class_mask',
    'innermost',
    'labelled_data',
    'number_of_classes',
)
