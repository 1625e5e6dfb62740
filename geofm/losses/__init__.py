"""Losses that lightly and TorchGeo lack."""

from geofm.losses.centering import EMACentering, SinkhornKnopp
from geofm.losses.distillation import DINOLoss, IBOTLoss

__all__ = ('DINOLoss', 'EMACentering', 'IBOTLoss', 'SinkhornKnopp')
