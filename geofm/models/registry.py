"""Register the models with timm: ``timm.create_model('geofm_vit_small_patch16_linear')``."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geofm.models.architecture import TIMM_ARGS, Request
from geofm.models.checkpoints.hub_args import DEFINED, STATISTICS, check_hub_args, take_hub_args
from geofm.models.checkpoints.trust import refuse_nonfinite
from geofm.models.fusion import FUSIONS
from geofm.models.multisensor import MultiSensorViT, UnnamedBandsError
from geofm.models.weights.torchgeo import accept_both_names
from geofm.sensors import DEFAULT_SENSORS, SENSORS
from geofm.transforms import InputStatistics

#: Width, depth and number of heads, as in DeiT, timm and DINOv2 (whose giant has SwiGLU). Nano has
#: half the depth of tiny, for laptops.
SIZES: dict[str, dict[str, Any]] = {
    'nano': {'embed_dim': 192, 'depth': 6, 'num_heads': 3},
    'tiny': {'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
    'giant': {'embed_dim': 1536, 'depth': 40, 'num_heads': 24, 'ffn_layer': 'swiglu'},
}

#: Patch sizes in pixels; 8 is for small images.
PATCH_SIZES: tuple[int, ...] = (8, 14, 16)

#: Sensors and fusion of a model, by the last part of its name. Set other sensors with ``model_args:
#: {sensors: [...]}``.
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {'sensors': DEFAULT_SENSORS, 'fusion': kind} for kind in FUSIONS},
    **{key: {'sensors': (key,)} for key in DEFAULT_SENSORS},
}

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f'geofm_vit_{size}_patch{patch_size}_{variant}': {
        'patch_size': patch_size,
        **SIZES[size],
        **VARIANTS[variant],
    }
    for size in SIZES
    for patch_size in PATCH_SIZES
    for variant in VARIANTS
}


def _config(architecture: dict[str, Any]) -> dict[str, Any]:
    channels = sum(len(SENSORS[key].bands) for key in architecture['sensors'])
    return {'input_size': (channels, 224, 224), 'num_classes': 0, 'classifier': 'head'}


# register_model looks for this name in the module of the entry point.
default_cfgs = generate_default_cfgs(
    {name: _config(architecture) for name, architecture in _ARCHITECTURES.items()}
)


def _ffn_args(ffn_layer: str, embed_dim: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    """Return the arguments of timm's ViT for a feed-forward layer with DINOv2's name."""
    if ffn_layer == 'mlp':
        return {'mlp_ratio': mlp_ratio}
    if ffn_layer != 'swiglu':
        raise ValueError(f"ffn_layer must be 'mlp' or 'swiglu', not '{ffn_layer}'")
    # Two thirds of the width, because there are three matrices instead of two; a multiple of 8.
    hidden = (int(embed_dim * mlp_ratio * 2 / 3) + 7) // 8 * 8
    # timm's layer has gate and value in one matrix, hence 2; adding 0.5 is safe against its int().
    ratio = (2 * hidden + 0.5) / embed_dim
    return {'mlp_ratio': ratio, 'mlp_layer': SwiGLUPacked, 'act_layer': nn.SiLU}


def _build(
    name: str,
    pretrained: bool,
    embed_dim: int,
    ffn_layer: str = 'mlp',
    mlp_ratio: float = 4.0,
    **kwargs: Any,
) -> MultiSensorViT:
    model: MultiSensorViT = build_model_with_cfg(
        MultiSensorViT,
        name,
        pretrained,
        feature_cfg={'out_indices': 3, 'feature_cls': 'getter'},
        embed_dim=embed_dim,
        **_ffn_args(ffn_layer, embed_dim, mlp_ratio),
        **kwargs,
    )
    model.register_load_state_dict_pre_hook(refuse_nonfinite)
    return accept_both_names(model)


def _build_unnamed(name: str, pretrained: bool, **kwargs: Any) -> MultiSensorViT:
    """Build a model whose bands will be set by the weights that are loaded later."""
    channels = kwargs['in_chans']
    # The names do not matter: TorchGeo checks the number of channels of the first encoder only.
    parts = [SENSORS[key].band_names for key in kwargs['sensors']]
    every = tuple(band for bands in parts for band in bands)
    bands = (every if channels > len(parts[0]) else max(parts, key=len))[:channels]
    model = _build(name, pretrained, **{**kwargs, 'bands': bands})
    model.bands = ()
    return model


def _enough_sensors(sensors: Sequence[str], channels: int) -> tuple[str, ...] | None:
    """Extend sensors until they have enough bands; None if all sensors have too few.

    The weights that are loaded later may be for other sensors than those of the model's name.
    """
    chosen = tuple(sensors)
    others = iter([key for key in SENSORS if key not in chosen])
    while sum(len(SENSORS[key].bands) for key in chosen) < channels:
        key = next(others, None)
        if key is None:
            return None
        chosen = (*chosen, key)
    return chosen


def _defaults(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default arguments of a model."""
    classes = (VisionTransformer, MultiSensorViT)
    return {
        **{n: p.default for c in classes for n, p in inspect.signature(c).parameters.items()},
        # As MultiSensorViT passes them on, and as in _build.
        'no_embed_class': True,
        'dynamic_img_size': True,
        'ffn_layer': 'mlp',
        'mlp_ratio': 4.0,
        **architecture,
    }


def _take_hub_args(name: str, kwargs: dict[str, Any]) -> InputStatistics | None:
    """Remove the entries of a hub folder from the arguments of a model, and check the others."""
    own = {key: value for key, value in kwargs.items() if key not in TIMM_ARGS}
    check = {DEFINED, STATISTICS} & own.keys()
    source = f"the configuration of '{name}'"
    if check:
        check_hub_args(own, source)
    return take_hub_args(kwargs, source)


def _register(name: str, architecture: dict[str, Any]) -> None:
    defaults = _defaults(architecture)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MultiSensorViT:
        statistics = _take_hub_args(name, kwargs)
        every = {**architecture, **kwargs}
        try:
            model = _build(name, pretrained, **every)
        except UnnamedBandsError:
            sensors = _enough_sensors(every['sensors'], kwargs['in_chans'])
            if sensors is None or ('sensors' in kwargs and sensors != tuple(every['sensors'])):
                raise
            model = _build_unnamed(name, pretrained, **{**every, 'sensors': sensors})
        given = {key: value for key, value in kwargs.items() if key not in TIMM_ARGS}
        # With features_only=True, timm wraps the model.
        inner: Any = getattr(model, 'model', model)
        inner.remember(Request(name, given, defaults))
        if statistics is not None:
            inner.statistics = statistics
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    register_model(entrypoint)


for _name, _architecture in _ARCHITECTURES.items():
    _register(_name, _architecture)

#: Names of all registered models.
MODEL_NAMES: tuple[str, ...] = tuple(_ARCHITECTURES)
# register_model adds entry points to __all__, but this module has no such attributes.
__all__ = ('MODEL_NAMES', 'PATCH_SIZES', 'SIZES', 'VARIANTS')
