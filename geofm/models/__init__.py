"""Backbones: importing this package registers them with timm."""

from .checkpoints import (
    CheckpointError,
    create_backbone,
    export_torchgeo,
    load_backbone,
    load_backbone_weights,
    read_hparams,
)
from .multisensor import MultiSensorViT
from .registry import MODEL_NAMES

__all__ = [
    'MODEL_NAMES',
    'CheckpointError',
    'MultiSensorViT',
    'create_backbone',
    'export_torchgeo',
    'load_backbone',
    'load_backbone_weights',
    'read_hparams',
]
