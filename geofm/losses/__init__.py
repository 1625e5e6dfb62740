"""Losses that lightly and TorchGeo do not provide."""

from geofm.losses.distillation import DINOLoss, EMACentering, IBOTLoss, SinkhornKnopp
from geofm.losses.features import FeatureLoss, GramLoss, resize_tokens
from geofm.losses.precision import at_least_float32
from geofm.losses.ranks import gathered, reduced
from geofm.losses.word_targets import Targets, WordTargets

__all__ = (
    'DINOLoss',
    'EMACentering',
    'FeatureLoss',
    'GramLoss',
    'IBOTLoss',
    'SinkhornKnopp',
    'Targets',
    'WordTargets',
    'at_least_float32',
    'gathered',
    'reduced',
    'resize_tokens',
)
