"""Callbacks: diagnostics of pretraining, adaptation in fine-tuning, signals and run identity."""

from geofm.callbacks.adapt import Adapt
from geofm.callbacks.collapse import CollapseWatch
from geofm.callbacks.identity import (
    RUN_FILE,
    RunIdentity,
    read_run_file,
    requeue_checkpoints,
    run_of,
)
from geofm.callbacks.knn import OnlineKNN
from geofm.callbacks.signals import StopOnSignal
from geofm.callbacks.training_time import TrainingTime

__all__ = (
    'RUN_FILE',
    'Adapt',
    'CollapseWatch',
    'OnlineKNN',
    'RunIdentity',
    'StopOnSignal',
    'TrainingTime',
    'read_run_file',
    'requeue_checkpoints',
    'run_of',
)
