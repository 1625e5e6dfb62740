"""Backbones: importing this package registers them with timm."""

from geofm.models.checkpoints import (
    CheckpointError,
    create_backbone,
    export_torchgeo,
    load_backbone,
    load_backbone_weights,
    read_hparams,
    read_task_weights,
)
from geofm.models.multisensor import MultiSensorViT, View, ViewTokens
from geofm.models.registry import MODEL_NAMES

__all__ = (
    'MODEL_NAMES',
    'CheckpointError',
    'MultiSensorViT',
    'View',
    'ViewTokens',
    'create_backbone',
    'export_torchgeo',
    'load_backbone',
    'load_backbone_weights',
    'read_hparams',
    'read_task_weights',
)
