"""Backbones: importing this package registers them with timm and segmentation-models-pytorch."""

from geofm.models.checkpoints import (
    CheckpointError,
    create_backbone,
    export_torchgeo,
    load_backbone,
    load_backbone_weights,
    read_hparams,
)
from geofm.models.multisensor import MultiSensorViT
from geofm.models.pyramid import SimpleFeaturePyramid
from geofm.models.registry import MODEL_NAMES
from geofm.models.smp import PyramidEncoder, register_encoder

__all__ = (
    'MODEL_NAMES',
    'CheckpointError',
    'MultiSensorViT',
    'PyramidEncoder',
    'SimpleFeaturePyramid',
    'create_backbone',
    'export_torchgeo',
    'load_backbone',
    'load_backbone_weights',
    'read_hparams',
    'register_encoder',
)
