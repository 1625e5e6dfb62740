"""Checks of untrusted files: names of registered models, plain arguments, finite weights.

timm's ``create_model`` downloads models with names such as ``hf-hub:...``, opens other files for
``local-dir:...``, and an argument such as ``pretrained_cfg`` may contain a URL. Values from a file
must therefore be checked here before they are passed to timm.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from geofm.models.checkpoints.files import CheckpointError
from geofm.models.fusion import FUSIONS
from geofm.sensors import SENSORS
from geofm.suggestions import did_you_mean

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    # NaN compares False.
    return lambda value: type(value) in (int, float) and low <= value <= high


def _flag(value: Any) -> bool:
    return type(value) is bool


def _one_of(*choices: str | None) -> Callable[[Any], bool]:
    return lambda value: (value is None or type(value) is str) and value in choices


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _side(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value]
    return 1 <= len(sides) <= 2 and all(_integer(1, 16_384)(side) for side in sides)


def _sensor(value: Any) -> bool:
    # Look up at each call, because sensors may be registered at any time.
    return type(value) is str and value in SENSORS


def _sensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_sensor(key) for key in value)


def _layer(value: Any) -> bool:
    """Return whether a value can be a name of a layer that timm looks up in its own table."""
    return type(value) is str and re.fullmatch(r'[A-Za-z0-9_]{1,32}', value) is not None


#: Arguments of a model that a file may contain, and a check of each value. The limits are far above
#: those of real models. They keep a damaged file from describing a model too large for any machine.
MODEL_ARGS: dict[str, Callable[[Any], bool]] = {
    'img_size': _side,
    'patch_size': _side,
    'embed_dim': _integer(1, 16_384),
    'depth': _integer(1, 128),
    'num_heads': _integer(1, 1_024),
    'mlp_ratio': _number(0.01, 64),
    'ffn_layer': _one_of('mlp', 'swiglu'),
    'init_values': _optional(_number(0, 1e3)),
    'reg_tokens': _integer(0, 1_024),
    'sensors': _sensors,
    # Looked up when it is called: users can add fusions.
    'fusion': lambda value: type(value) is str and value in FUSIONS,
    'query': _sensor,
    'nhead': _integer(1, 1_024),
    'nlayer': _integer(1, 128),
    'dropout': _number(0, 1),
    'shared': _flag,
    'global_pool': _one_of('', 'token', 'avg', 'avgmax', 'max', 'map', 'prr'),
    'pos_embed': _one_of('', 'none', 'learn'),
    'weight_init': _one_of('', 'skip', 'reset', 'jax', 'jax_nlhb', 'moco'),
    'norm_layer': _optional(_layer),
    'act_layer': _optional(_layer),
    'fc_norm': _optional(_flag),
    **dict.fromkeys(
        (
            'drop_rate',
            'pos_drop_rate',
            'patch_drop_rate',
            'proj_drop_rate',
            'attn_drop_rate',
            'drop_path_rate',
        ),
        _number(0, 1),
    ),
    **dict.fromkeys(
        (
            'qkv_bias',
            'qk_norm',
            'scale_attn_norm',
            'scale_mlp_norm',
            'proj_bias',
            'class_token',
            'no_embed_class',
            'pre_norm',
            'final_norm',
            'pool_include_prefix',
            'dynamic_img_size',
            'dynamic_img_pad',
            'fix_init',
        ),
        _flag,
    ),
}


def check_model_name(name: Any, known: Collection[str] | None = None) -> str:
    """Check that a name is the name of a registered model.

    Args:
        name: The name.
        known: Allowed names; None: all models that are registered with timm, including geofm's.

    Returns:
        The name.

    Raises:
        ValueError: If there is no such model.
    """
    if not isinstance(name, str):
        raise ValueError(f'the name of its model is of type {type(name).__name__}, not a string')
    # The name may have a suffix with a tag of pretrained weights.
    registered = re.fullmatch(r'\w+(\.\w+)?', name) is not None and timm.is_model(name)
    if registered if known is None else name in known:
        return name
    names = timm.list_models() if known is None else known
    raise ValueError(f'no model is called {_short(name)}{did_you_mean(name, names)}')


def check_model_args(args: Any) -> dict[str, Any]:
    """Check that arguments of a model are known and have plain values within limits.

    Args:
        args: The arguments by name; None: none.

    Returns:
        The arguments.

    Raises:
        ValueError: If an argument is unknown or its value is invalid.
    """
    if args is None:
        return {}
    if not isinstance(args, Mapping):
        raise ValueError(f'model_args is of type {type(args).__name__}, not a mapping')
    for key, value in args.items():
        if key not in MODEL_ARGS:
            raise ValueError(
                f'model_args has an argument {_short(key)} that is not allowed in a checkpoint'
                f'{did_you_mean(str(key), MODEL_ARGS)}'
            )
        if key == 'sensors' and isinstance(value, list | tuple):
            for sensor in value:
                if not _sensor(sensor):
                    raise ValueError(
                        f'model_args: the sensor {_short(sensor)} is unknown: define it in a file '
                        'for --sensors'
                    )
        if not MODEL_ARGS[key](value):
            raise ValueError(f'model_args: {key} has the invalid value {_short(value)}')
    return dict(args)


def check_weights(weights: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Check that weights from a file are named tensors with finite values.

    Args:
        weights: The weights by name.
        path: The file.

    Returns:
        The weights.

    Raises:
        CheckpointError: If one is not a tensor of numbers, or holds NaN or infinity.
    """
    bad: list[str] = []
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f'{path}: {_short(name)} is not a tensor of weights')
        # The shape of a tensor may exceed the data that are stored for it.
        size = value.numel() * value.element_size()
        if value.layout != torch.strided or size > value.untyped_storage().nbytes():
            raise CheckpointError(f'{path}: {_short(name)} is not a dense tensor')
        if value.is_floating_point() or value.is_complex():
            if value.dtype not in _FLOATS:
                raise CheckpointError(f'{path}: {_short(name)} has weights of type {value.dtype}')
            if not value.isfinite().all():
                bad.append(name)
    if bad:
        raise CheckpointError(
            f'{path}: {len(bad)} of {len(weights)} weights contain NaN or infinity, such as '
            f'{_short(bad[0])}: the run diverged or the file is damaged; use an earlier checkpoint'
        )
    return dict(weights)


def refuse_nonfinite(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict`` that raises an error for weights that are not finite.

    It covers files that geofm does not read itself, such as the weights of TorchGeo's tasks.

    Args:
        model: The model to load into.
        state_dict: The weights, possibly among others.
        prefix: Prefix of the names of the model's weights.
        _: Further arguments of the hook.

    Raises:
        CheckpointError: If a weight of the model contains NaN or infinity.
    """
    for name in model.state_dict():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and not value.is_meta and not value.isfinite().all():
            raise CheckpointError(
                f'the weights to load contain NaN or infinity, such as {name}: the run diverged or '
                'the file is damaged; use an earlier checkpoint'
            )


def _short(value: Any) -> str:
    """Format a value from a file for a message: printable, on one line, and short."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else ''
    return (text if len(text) <= 80 else f'{text[:77]}...') or f'of type {type(value).__name__}'
