"""Backbones. Importing this package registers them with timm and segmentation-models-pytorch."""

from geofm.models.checkpoints.backbones import (
    create_backbone,
    load_backbone,
    read_hparams,
    read_task_weights,
)
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.multisensor import MultiSensorViT
from geofm.models.pyramid import SimpleFeaturePyramid
from geofm.models.registry import MODEL_NAMES
from geofm.models.smp import PyramidEncoder, register_encoder
from geofm.models.tokens import View, ViewTokens
from geofm.models.weights.export import export_backbone, export_torchgeo
from geofm.models.weights.load import load_backbone_weights
from geofm.models.weights.sources import Source

__all__ = (
    'MODEL_NAMES',
    'CheckpointError',
    'MultiSensorViT',
    'PyramidEncoder',
    'SimpleFeaturePyramid',
    'Source',
    'View',
    'ViewTokens',
    'create_backbone',
    'export_backbone',
    'export_torchgeo',
    'load_backbone',
    'load_backbone_weights',
    'read_hparams',
    'read_task_weights',
    'register_encoder',
)
