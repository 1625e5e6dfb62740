"""Weights of other projects' ViTs in, and ours out."""

from geofm.models.weights.adapters import (
    adapted_layers,
    adapter_state,
    add_adapters,
    load_adapter_state,
)
from geofm.models.weights.torchgeo import is_for_dpt

__all__ = (
    'adapted_layers',
    'adapter_state',
    'add_adapters',
    'is_for_dpt',
    'load_adapter_state',
)
