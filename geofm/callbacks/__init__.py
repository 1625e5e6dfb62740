"""Callbacks: what watches a pretraining run."""

from geofm.callbacks.collapse import CollapseWatch
from geofm.callbacks.knn import OnlineKNN

__all__ = ('CollapseWatch', 'OnlineKNN')
