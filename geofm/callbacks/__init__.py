"""Callbacks: diagnostics of pretraining, adaptation in fine-tuning, signals and run identity."""

from geofm.callbacks.adapt import Adapt
from geofm.callbacks.collapse import CollapseWatch
from geofm.callbacks.identity import RunIdentity
from geofm.callbacks.knn import OnlineKNN
from geofm.callbacks.signals import StopOnSignal
from geofm.callbacks.training_time import TrainingTime

__all__ = ('Adapt', 'CollapseWatch', 'OnlineKNN', 'RunIdentity', 'StopOnSignal', 'TrainingTime')
