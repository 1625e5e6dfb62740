"""What may come out of a file: names of registered models, plain arguments, finite weights.

timm's ``create_model`` follows names such as ``hf-hub:...`` to the network and ``local-dir:...`` to
other files, and an argument such as ``pretrained_cfg`` may name a URL. So nothing that a file says
reaches timm before it was checked here.
"""

import difflib
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

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    # Not a number compares False.
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
    # Looked up at each call: sensors may be registered at any time.
    return type(value) is str and value in SENSORS


def _sensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_sensor(key) for key in value)


def _layer(value: Any) -> bool:
    """A name that timm looks up in a table of its own."""
    return type(value) is str and re.fullmatch(r'[A-Za-z0-9_]{1,32}', value) is not None


#: Arguments of a model that a file may hold, and what each may be. The limits are far above what
#: any model has; they keep a damaged file from asking for a model that fits no machine.
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
    'fusion': _one_of(*FUSIONS),
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
    """Check that a name is one of a registered model.

    Args:
        name: The name.
        known: Names that are allowed; None: all that timm has registered, ours among them.

    Returns:
        The name.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(name, str):
        raise ValueError(f'the name of its model is of type {type(name).__name__}, not a string')
    # A tag of pretrained weights may follow the name.
    registered = re.fullmatch(r'\w+(\.\w+)?', name) is not None and timm.is_model(name)
    if registered if known is None else name in known:
        return name
    names = timm.list_models() if known is None else known
    raise ValueError(f'no model is called {_short(name)}{did_you_mean(name, names)}')


def check_model_args(args: Any) -> dict[str, Any]:
    """Check arguments of a model: known ones alone, with plain values within limits.

    Args:
        args: The arguments by name; None: none.

    Returns:
        The arguments.

    Raises:
        ValueError: If an argument is unknown, or is not what it may be.
    """
    if args is None:
        return {}
    if not isinstance(args, Mapping):
        raise ValueError(f'model_args is of type {type(args).__name__}, not a mapping')
    for key, value in args.items():
        if key not in MODEL_ARGS:
            raise ValueError(
                f'model_args has an argument {_short(key)} that no checkpoint may hold'
                f'{did_you_mean(key, MODEL_ARGS)}'
            )
        if key == 'sensors' and isinstance(value, list | tuple):
            for sensor in value:
                if not _sensor(sensor):
                    raise ValueError(
                        f'model_args: the sensor {_short(sensor)} is not known here: define it in '
                        'a file for --sensors'
                    )
        if not MODEL_ARGS[key](value):
            raise ValueError(f'model_args: {key} cannot be {_short(value)}')
    return dict(args)


def check_weights(weights: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Check weights out of a file: tensors with names, and all of their numbers finite.

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
        # A tensor may claim to be larger than what the file stores of it.
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
            f'{path}: {len(bad)} of {len(weights)} weights hold NaN or infinity, such as '
            f'{_short(bad[0])}: the run diverged or the file is damaged; take an earlier checkpoint'
        )
    return dict(weights)


def refuse_nonfinite(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights that are not finite, as a pre-hook of ``load_state_dict``.

    For files that others read: TorchGeo's tasks give a model the weights alone.

    Args:
        model: The model that is to take the weights.
        state_dict: The weights, and perhaps others.
        prefix: What stands before the names of the model's weights.
        _: Further arguments of such a hook.

    Raises:
        CheckpointError: If a weight of the model holds NaN or infinity.
    """
    for name in model.state_dict():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and not value.is_meta and not value.isfinite().all():
            raise CheckpointError(
                f'the weights to load hold NaN or infinity, such as {name}: the run diverged or '
                'the file is damaged; take an earlier checkpoint'
            )


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """What to add to the message of an error about an unknown name.

    Args:
        name: The name.
        known: Names that there are.

    Returns:
        ``; did you mean ...?``, or nothing if no name is near.
    """
    near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.6)
    return f'; did you mean {near[0]}?' if near else ''


def one_line(error: BaseException) -> str:
    """Message of an error on one line, shortened.

    Args:
        error: The error.

    Returns:
        The message.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]} ...'


def _short(value: Any) -> str:
    """A value from a file as a message may show it: printable, on one line, not too long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else ''
    return (text if len(text) <= 80 else f'{text[:77]}...') or f'of type {type(value).__name__}'
