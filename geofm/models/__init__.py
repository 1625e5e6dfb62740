"""Backbones. Importing this package registers them with timm and segmentation-models-pytorch."""

from geofm.models.attention import TokensAndAttention
from geofm.models.checkpoints.backbones import (
    create_backbone,
    load_backbone,
    read_hparams,
    read_task_weights,
)
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.dates import NO_DATE
from geofm.models.decoder import MaskedDecoder
from geofm.models.multisensor import MultiSensorViT
from geofm.models.packed_attention import choose_attention
from geofm.models.patch_words import PatchWords
from geofm.models.registry import MODEL_NAMES, VARIANTS
from geofm.models.shapes import shapes_only
from geofm.models.smp import PyramidEncoder, SimpleFeaturePyramid, register_encoder
from geofm.models.timm_vit import TimmViT, has_cls_token, load_model
from geofm.models.tokens import SensorTokens, View, ViewTokens
from geofm.models.weights.export import export_backbone, export_torchgeo
from geofm.models.weights.load import Source, load_backbone_weights

__all__ = (
    'MODEL_NAMES',
    'NO_DATE',
    'VARIANTS',
    'CheckpointError',
    'MaskedDecoder',
    'MultiSensorViT',
    'PatchWords',
    'PyramidEncoder',
    'SensorTokens',
    'SimpleFeaturePyramid',
    'Source',
    'TimmViT',
    'TokensAndAttention',
    'View',
    'ViewTokens',
    'choose_attention',
    'create_backbone',
    'export_backbone',
    'export_torchgeo',
    'has_cls_token',
    'load_backbone',
    'load_backbone_weights',
    'load_model',
    'read_hparams',
    'read_task_weights',
    'register_encoder',
    'shapes_only',
)
