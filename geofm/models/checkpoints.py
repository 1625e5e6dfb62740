"""This project's checkpoints, and backbones out of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from geofm.models.multisensor import MultiSensorViT
from geofm.models.weights.files import METADATA, CheckpointError, read_file

#: What a DINOv2 task's checkpoint calls its teacher's backbone.
PREFIX = 'model.'

#: Hyperparameters that describe a backbone; TorchGeo's tasks have but some of them.
_DESCRIBED = {'model', 'in_channels', 'bands', 'model_args'}


class Checkpoint(NamedTuple):
    """What a checkpoint of the DINOv2 task, or an export of it, says of the backbone.

    Attributes:
        hparams: Hyperparameters of the task.
        weights: Weights of the backbone, by its own names.
    """

    hparams: dict[str, Any]
    weights: dict[str, Tensor]


def as_checkpoint(content: Any) -> Checkpoint | None:
    """Take a file's content for a checkpoint of this project.

    Args:
        content: What :func:`~geofm.models.weights.files.read_file` gave.

    Returns:
        The checkpoint, or None if it is none of this project's.
    """
    if not isinstance(content, Mapping) or 'state_dict' not in content:
        return None
    said = content.get(METADATA, {}).get('hyper_parameters')
    if said is not None:
        return Checkpoint(said, content['state_dict'])
    hparams = content.get('hyper_parameters') or {}
    if not set(hparams) >= _DESCRIBED:
        return None
    weights = {
        key.removeprefix(PREFIX): value
        for key, value in content['state_dict'].items()
        if key.startswith(PREFIX)
    }
    return Checkpoint(dict(hparams), weights) if weights else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of the DINOv2 task, or what ``geofm export`` made of one.

    Args:
        path: The file.

    Returns:
        Its hyperparameters and the backbone's weights.

    Raises:
        CheckpointError: If it cannot be read, or is of another kind.
    """
    return _checkpoint_in(read_file(path), path)


def _checkpoint_in(content: Any, path: Path) -> Checkpoint:
    """A file's content as a checkpoint, or why it is none."""
    checkpoint = as_checkpoint(content)
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
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f'{checkpoint}: its weights do not fit the model they are to be loaded into: {error}'
        ) from error


def create_backbone(hparams: Mapping[str, Any], **kwargs: Any) -> MultiSensorViT:
    """Build the backbone that a DINOv2 task's hyperparameters describe.

    Args:
        hparams: Hyperparameters with ``model``, ``in_channels``, ``bands`` and ``model_args``.
        kwargs: Further arguments of the model.

    Returns:
        The backbone, without a head.

    Raises:
        TypeError: If the name is not that of a geofm model.
    """
    backbone = timm.create_model(
        hparams['model'],
        in_chans=hparams['in_channels'],
        bands=hparams['bands'],
        num_classes=0,
        **{**(hparams['model_args'] or {}), **kwargs},
    )
    if not isinstance(backbone, MultiSensorViT):
        raise TypeError(f"'{hparams['model']}' is not a geofm model; see geofm.models.MODEL_NAMES")
    return backbone


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
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`, or what ``geofm export``
            made of it with ``--to geofm`` or ``--to torchgeo``.

    Returns:
        The EMA teacher's backbone, in evaluation mode.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    path = Path(checkpoint)
    hparams, weights = read_checkpoint(path)
    backbone = create_backbone(hparams)
    load_strictly(backbone, weights, path)
    return backbone.eval()


def read_task_weights(
    checkpoint: str | os.PathLike[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of a whole task, student, teacher and heads, for one that goes on with them.

    Args:
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`.
        state: Weights of the task that is to go on. What the checkpoint does not have, a centre
            or a Gram teacher, is taken from there.

    Returns:
        Weights for the task's ``load_state_dict``.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    path = Path(checkpoint)
    content = read_file(path)
    _checkpoint_in(content, path)
    found = content['state_dict']
    own = ('dino_center.', 'ibot_center.', 'gram_backbone.')
    missing = [key for key in state if key not in found and not key.startswith(own)]
    other = [key for key in state if key in found and found[key].shape != state[key].shape]
    if missing or other:
        raise CheckpointError(
            f'{path}: cannot be gone on from with this model and these heads: '
            f'{len(missing)} weights are missing, {len(other)} have another shape, such as '
            f'{(missing + other)[0]}'
        )
    return {key: found.get(key, value) for key, value in state.items()}
