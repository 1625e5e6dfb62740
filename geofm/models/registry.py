"""The models under their names: ``timm.create_model('geofm_vit_small_patch16_linear')``."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from geofm.models.multisensor import MultiSensorViT
from geofm.sensors import SENSORS

#: Width, depth and heads, as in DeiT and timm.
SIZES: dict[str, dict[str, int]] = {
    'tiny': {'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}

#: Which sensors a model has and how it fuses them, by the last part of its name.
VARIANTS: dict[str, dict[str, Any]] = {
    'linear': {'sensors': ('s1', 's2'), 'fusion': 'linear'},
    'xattn': {'sensors': ('s1', 's2'), 'fusion': 'xattn'},
    's1': {'sensors': ('s1',)},
    's2': {'sensors': ('s2',)},
}

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f'geofm_vit_{size}_patch16_{variant}': {'patch_size': 16, **SIZES[size], **VARIANTS[variant]}
    for size in SIZES
    for variant in VARIANTS
}


def _config(architecture: dict[str, Any]) -> dict[str, Any]:
    channels = sum(len(SENSORS[key].bands) for key in architecture['sensors'])
    return {'input_size': (channels, 224, 224), 'num_classes': 0, 'classifier': 'head'}


# register_model looks for this name in the module of the entry point.
default_cfgs = generate_default_cfgs(
    {name: _config(architecture) for name, architecture in _ARCHITECTURES.items()}
)


def _register(name: str, architecture: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MultiSensorViT:
        model: MultiSensorViT = build_model_with_cfg(
            MultiSensorViT,
            name,
            pretrained,
            feature_cfg={'out_indices': 3, 'feature_cls': 'getter'},
            **{**architecture, **kwargs},
        )
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    register_model(entrypoint)


for _name, _architecture in _ARCHITECTURES.items():
    _register(_name, _architecture)

#: Names of all registered models.
MODEL_NAMES: tuple[str, ...] = tuple(_ARCHITECTURES)
# register_model adds entry points to __all__; they have no attribute here.
__all__ = ('MODEL_NAMES', 'SIZES', 'VARIANTS')
