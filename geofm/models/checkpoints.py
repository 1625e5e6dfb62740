"""This project's checkpoints, and backbones out of them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from geofm.models.architecture import KEY, is_marker
from geofm.models.multisensor import MultiSensorViT
from geofm.models.registry import MODEL_NAMES
from geofm.models.weights.carried import find_statistics
from geofm.models.weights.definitions import take_up_sensors_of
from geofm.models.weights.files import METADATA, CheckpointError, read_file
from geofm.models.weights.trust import (
    check_model_args,
    check_model_name,
    check_weights,
    one_line,
)
from geofm.sensors import check_bands
from geofm.transforms.statistics import InputStatistics

#: What a DINOv2 task's checkpoint calls its teacher's backbone.
PREFIX = 'model.'

#: Names of weights of blocks, which tell their number.
_BLOCK = re.compile(r'encoders\.\w+\.blocks\.(\d+)\.')

#: Hyperparameters that describe a backbone; TorchGeo's tasks have but some of them.
_DESCRIBED = {'model', 'in_channels', 'bands', 'model_args'}


class Checkpoint(NamedTuple):
    """What a checkpoint of the DINOv2 task, or an export of it, says of the backbone.

    Attributes:
        hparams: Hyperparameters of the task; those of the backbone are checked.
        weights: Weights of the backbone, by its own names, all finite.
        statistics: How its input was normalised; None if it does not say.
    """

    hparams: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: InputStatistics | None = None


def as_checkpoint(content: Any, path: Path) -> Checkpoint | None:
    """Take a file's content for a checkpoint of this project.

    Args:
        content: What :func:`~geofm.models.weights.files.read_file` gave.
        path: The file, for messages.

    Returns:
        The checkpoint, or None if it is none of this project's.

    Raises:
        CheckpointError: If it is one, but what it says of the backbone cannot be, or its weights
            are not finite.
    """
    if not isinstance(content, Mapping) or 'state_dict' not in content:
        return None
    metadata = content.get(METADATA)
    hparams = metadata.get('hyper_parameters') if isinstance(metadata, Mapping) else None
    prefix = ''
    if hparams is None:
        hparams, prefix = content.get('hyper_parameters') or {}, PREFIX
    for key, value in (('hyper_parameters', hparams), ('state_dict', content['state_dict'])):
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: '{key}' is of type {type(value).__name__}, not a mapping: damaged"
            )
    if not set(hparams) >= _DESCRIBED:
        return None
    weights = {
        key.removeprefix(prefix): value
        for key, value in content['state_dict'].items()
        if isinstance(key, str)
        and key.startswith(prefix)
        and key != prefix + KEY
        and not is_marker(value)
    }
    if not weights:
        return None
    take_up_sensors_of(content, path)
    return Checkpoint(
        _checked(hparams, weights, path),
        check_weights(weights, path),
        find_statistics(content, path),
    )


def _checked(hparams: Mapping[str, Any], weights: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Hyperparameters of which those of the backbone are what they may be."""
    try:
        check_model_name(hparams['model'], MODEL_NAMES)
        check_model_args(hparams['model_args'])
        bands, channels = hparams['bands'], hparams['in_channels']
        if not isinstance(bands, list | tuple | None):
            raise ValueError(f'bands is of type {type(bands).__name__}, not a list of names')
        if bands is not None:
            check_bands(bands)
        if type(channels) is not int or channels < 1:
            raise ValueError('in_channels is not a positive number of channels')
        # Many blocks take long to build, even without memory.
        depth = (hparams['model_args'] or {}).get('depth')
        blocks = {match[1] for key in weights if (match := _BLOCK.match(key))}
        if depth is not None and blocks and depth != len(blocks):
            raise ValueError(f'describes {depth} blocks, but holds weights of {len(blocks)}')
    except ValueError as error:
        raise CheckpointError(f'{path}: {one_line(error)}') from error
    return dict(hparams)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of the DINOv2 task, or what ``geofm export`` made of one.

    Args:
        path: The file.

    Returns:
        Its hyperparameters, the backbone's weights, and the statistics of their input.

    Raises:
        CheckpointError: If it cannot be read, is of another kind, or what it holds cannot be.
    """
    return checkpoint_in(read_file(path), path)


def checkpoint_in(content: Any, path: Path) -> Checkpoint:
    """Take a file's content for a checkpoint of this project, and say why if it is none.

    Args:
        content: What :func:`~geofm.models.weights.files.read_file` gave.
        path: The file, for messages.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If it is of another kind, or what it holds cannot be.
    """
    checkpoint = as_checkpoint(content, path)
    if checkpoint is not None:
        return checkpoint
    lightning = {'state_dict', 'hyper_parameters'}
    if isinstance(content, Mapping) and lightning <= set(content):
        raise CheckpointError(
            f'{path}: a checkpoint of another task, without a pretrained backbone. '
            'Give one that `geofm fit` wrote with geofm.tasks.DINOv2'
        )
    raise CheckpointError(
        f'{path}: no Lightning checkpoint with hyperparameters. '
        'Give a .ckpt that `geofm fit` wrote, or what `geofm export --to geofm` made of one'
    )


def load_strictly(backbone: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load all weights of a checkpoint's backbone into one of the same build.

    Args:
        backbone: The backbone; changed in place.
        weights: The weights.
        checkpoint: The file that they are from.

    Raises:
        CheckpointError: If a weight does not fit, is missing or is too many.
    """
    check_fit(backbone.state_dict(), weights, checkpoint)
    backbone.load_state_dict(weights)


def check_fit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    checkpoint: Path,
    model: str = 'the model they are to be loaded into',
) -> None:
    """Check that weights are those of a model, by name and shape.

    Args:
        own: Weights of the model, on any device.
        weights: The weights.
        checkpoint: The file that they are from.
        model: What a message calls the model.

    Raises:
        CheckpointError: If a weight does not fit, is missing or is too many.
    """
    missing, unexpected = sorted(own.keys() - weights), sorted(weights.keys() - own)
    shapes = [
        f'{key} is {tuple(weights[key].shape)}, not {tuple(own[key].shape)}'
        for key in own
        if key in weights and own[key].shape != weights[key].shape
    ]
    parts = [
        f'{len(names)} {what}, such as {ascii(names[0])[1:-1]:.200}'
        for what, names in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('of another shape', shapes),
        )
        if names
    ]
    if parts:
        raise CheckpointError(f'{checkpoint}: its weights do not fit {model}: {"; ".join(parts)}')


def create_backbone(hparams: Mapping[str, Any], **kwargs: Any) -> MultiSensorViT:
    """Build the backbone that a DINOv2 task's hyperparameters describe.

    Args:
        hparams: Hyperparameters with ``model``, ``in_channels``, ``bands`` and ``model_args``. They
            may be those of a file: nothing is downloaded for them.
        kwargs: Further arguments of the model.

    Returns:
        The backbone, without a head.

    Raises:
        TypeError: If the name is not that of a geofm model.
        ValueError: If there is no such argument of a model, or it cannot be what it is.
    """
    try:
        name = check_model_name(hparams['model'], MODEL_NAMES)
    except ValueError as error:
        raise TypeError(f'{error}: not a geofm model; see geofm.models.MODEL_NAMES') from error
    backbone: Any = timm.create_model(
        name,
        in_chans=hparams['in_channels'],
        bands=hparams['bands'],
        num_classes=0,
        **{**check_model_args(hparams['model_args']), **kwargs},
    )
    assert isinstance(backbone, MultiSensorViT)
    return backbone.fix_architecture()


def build_backbone(checkpoint: Checkpoint, path: Path) -> MultiSensorViT:
    """Build the backbone of a checkpoint and load its weights.

    Args:
        checkpoint: The checkpoint.
        path: The file that it is from.

    Returns:
        The EMA teacher's backbone, in evaluation mode.

    Raises:
        CheckpointError: If its hyperparameters describe no model, or its weights do not fit.
    """
    # Without memory first: a damaged file may describe a model that fits no machine.
    check_fit(describe_backbone(checkpoint, path).state_dict(), checkpoint.weights, path)
    backbone = create_backbone(checkpoint.hparams)
    load_strictly(backbone, checkpoint.weights, path)
    backbone.statistics = checkpoint.statistics
    return backbone.eval()


def describe_backbone(checkpoint: Checkpoint, path: Path) -> MultiSensorViT:
    """Build the backbone of a checkpoint on the meta device: its shapes, without weights.

    Args:
        checkpoint: The checkpoint.
        path: The file that it is from.

    Returns:
        The backbone.

    Raises:
        CheckpointError: If its hyperparameters describe no model.
    """
    try:
        with torch.device('meta'):
            return create_backbone(checkpoint.hparams)
    except Exception as error:
        # Whatever the model's parts raise about arguments that do not go together.
        raise CheckpointError(
            f'{path}: its hyperparameters describe no model: {one_line(error)}'
        ) from error


def read_hparams(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Hyperparameters of the task that wrote a checkpoint.

    Args:
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`, or an export of it.

    Returns:
        The hyperparameters by name.

    Raises:
        CheckpointError: If the file cannot be read or is of another kind.
    """
    return read_checkpoint(Path(checkpoint)).hparams


def load_backbone(checkpoint: str | os.PathLike[str]) -> MultiSensorViT:
    """Load the pretrained backbone of a checkpoint that ``geofm fit`` wrote.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, e.g. :class:`geofm.tasks.DINOv2`;
            what ``geofm export`` made of it with ``--to geofm``, ``--to torchgeo`` or ``--to
            hub``; or the name of weights that come with the package, e.g. 'eurosat-rgb-nano'.

    Returns:
        The backbone (with an EMA teacher: the teacher's), in evaluation mode. Its ``statistics``
        say how to normalise its input.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    path = Path(checkpoint)
    return build_backbone(read_checkpoint(path), path)


def read_task_weights(
    checkpoint: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    optional: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Weights of a whole task, student, teacher and heads, for a task that continues with them.

    Args:
        checkpoint: Lightning checkpoint of the same task, e.g. :class:`geofm.tasks.DINOv2`.
        state: Weights of the task that is to go on.
        optional: Prefixes of weights that the checkpoint may lack, e.g. those of a Gram teacher:
            these are then taken from *state*.

    Returns:
        Weights for the task's ``load_state_dict``.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    path = Path(checkpoint)
    content = read_file(path)
    checkpoint_in(content, path)
    found = check_weights(content['state_dict'], path)
    weights = [key for key in state if key.rsplit('.', 1)[-1] != KEY]
    missing = [key for key in weights if key not in found and not key.startswith(optional)]
    other = [key for key in weights if key in found and found[key].shape != state[key].shape]
    if missing or other:
        raise CheckpointError(
            f'{path}: does not fit this model and these heads: '
            f'{len(missing)} weights are missing, {len(other)} have another shape, such as '
            f'{(missing + other)[0]}'
        )
    return {key: found.get(key, state[key]) for key in weights}
