"""Load the weights of other projects' ViTs into backbones, and export backbones."""

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
