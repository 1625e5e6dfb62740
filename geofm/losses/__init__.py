"""Losses that lightly and TorchGeo do not provide."""

from geofm.losses.centering import EMACentering, SinkhornKnopp
from geofm.losses.distillation import DINOLoss, IBOTLoss
from geofm.losses.features import FeatureLoss
from geofm.losses.gram import GramLoss, resize_tokens

__all__ = (
    'DINOLoss',
    'EMACentering',
    'FeatureLoss',
    'GramLoss',
    'IBOTLoss',
    'SinkhornKnopp',
    'resize_tokens',
)
