"""Maps of classes from embeddings and a few labels."""

from geofm.maps.few_labels.classify import Classified, Fitting, classify_scenes
from geofm.maps.few_labels.heads import Head, Method

__all__ = ('Classified', 'Fitting', 'Head', 'Method', 'classify_scenes')
