"""Backbones to evaluate: built by name, with the preparation of their input and their features."""

from geofm.evaluation.backbones.adapter import Adapter, Missing, absent_sensors
from geofm.evaluation.backbones.build import (
    PATCH_WORDS_NAME,
    RCF_NAME,
    STATISTICS,
    Backbone,
    BackboneConfig,
    build_backbone,
    encoder_of,
    statistics_backbone,
)
from geofm.evaluation.backbones.encoders import (
    Encoder,
    PatchWordsEncoder,
    PooledEncoder,
    StatisticsEncoder,
    ViTEncoder,
    band_statistics_encoder,
)

__all__ = (
    'PATCH_WORDS_NAME',
    'RCF_NAME',
    'STATISTICS',
    'Adapter',
    'Backbone',
    'BackboneConfig',
    'Encoder',
    'Missing',
    'PatchWordsEncoder',
    'PooledEncoder',
    'StatisticsEncoder',
    'ViTEncoder',
    'absent_sensors',
    'band_statistics_encoder',
    'build_backbone',
    'encoder_of',
    'statistics_backbone',
)
