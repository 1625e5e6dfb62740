"""Fusion of several sensors into one sequence of tokens. Each kind is a module with ``KIND``."""

from geofm.models.fusion import cross_attention, early, joint, linear
from geofm.models.fusion.cross_attention import CrossAttentionBlock, CrossAttentionFusion
from geofm.models.fusion.linear import LinearFusion
from geofm.models.fusion.protocol import (
    SINGLE,
    Fusion,
    FusionArgs,
    FusionKind,
    Inputs,
    one_vit_per_sensor,
)

#: Kinds of fusion by name: values of the argument *fusion* of a model.
FUSIONS: dict[str, FusionKind] = {
    'linear': linear.KIND,
    'xattn': cross_attention.KIND,
    'early': early.KIND,
    'joint': joint.KIND,
}

__all__ = (
    'FUSIONS',
    'SINGLE',
    'CrossAttentionBlock',
    'CrossAttentionFusion',
    'Fusion',
    'FusionArgs',
    'FusionKind',
    'Inputs',
    'LinearFusion',
    'one_vit_per_sensor',
)
