"""Losses that lightly and TorchGeo lack."""

from .centering import EMACentering, SinkhornKnopp
from .distillation import DINOLoss, IBOTLoss

__all__ = ['DINOLoss', 'EMACentering', 'IBOTLoss', 'SinkhornKnopp']
