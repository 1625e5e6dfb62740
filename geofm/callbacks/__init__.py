"""Callbacks: what watches a pretraining run."""

from geofm.callbacks.adapt import Adapt
from geofm.callbacks.collapse import CollapseWatch
from geofm.callbacks.knn import OnlineKNN
from geofm.callbacks.training_time import TrainingTime

__all__ = ('Adapt', 'CollapseWatch', 'OnlineKNN', 'TrainingTime')
