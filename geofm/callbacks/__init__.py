"""Callbacks: what watches a pretraining run."""

from .collapse import CollapseWatch
from .knn import OnlineKNN

__all__ = ['CollapseWatch', 'OnlineKNN']
