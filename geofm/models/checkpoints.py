"""Backbones out of checkpoints, and into the files that others read."""

import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from geofm.models.multisensor import MultiSensorViT

#: What a DINOv2 task's checkpoint calls its teacher's backbone.
_PREFIX = 'model.'

#: What reading a file that is no checkpoint may raise: its bytes are run as pickle's opcodes.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
)


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be used here."""


def _read(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint of the DINOv2 task.

    Args:
        checkpoint: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: If it cannot be read, or is of another kind.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f'{checkpoint}: no such file')
    try:
        content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f'{checkpoint}: not a readable PyTorch checkpoint, or it holds more than weights. '
            'Give a .ckpt that `geofm fit` wrote'
        ) from error
    if not isinstance(content, dict) or not {'state_dict', 'hyper_parameters'} <= set(content):
        raise CheckpointError(
            f'{checkpoint}: no Lightning checkpoint with hyperparameters. '
            'Give a .ckpt that `geofm fit` wrote'
        )
    if 'model' not in content['hyper_parameters'] or not _backbone_weights(content):
        raise CheckpointError(
            f'{checkpoint}: a checkpoint of another task, without a pretrained backbone. '
            'Give one that `geofm fit` wrote with geofm.tasks.DINOv2'
        )
    return content


def _backbone_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        key.removeprefix(_PREFIX): value
        for key, value in content['state_dict'].items()
        if key.startswith(_PREFIX)
    }


def _load_strictly(backbone: nn.Module, weights: dict[str, Tensor], checkpoint: Path) -> None:
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
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`.

    Returns:
        The hyperparameters by name.

    Raises:
        CheckpointError: If the file cannot be read or is of another kind.
    """
    return dict(_read(Path(checkpoint))['hyper_parameters'])


def load_backbone(checkpoint: str | os.PathLike[str]) -> MultiSensorViT:
    """Load the pretrained backbone of a checkpoint that ``geofm fit`` wrote.

    Args:
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`.

    Returns:
        The EMA teacher's backbone, in evaluation mode.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    checkpoint = Path(checkpoint)
    content = _read(checkpoint)
    backbone = create_backbone(content['hyper_parameters'])
    _load_strictly(backbone, _backbone_weights(content), checkpoint)
    return backbone.eval()


def load_backbone_weights(backbone: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Load a checkpoint's backbone into one that exists.

    Args:
        backbone: Model of the same architecture; changed in place.
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    checkpoint = Path(checkpoint)
    _load_strictly(backbone, _backbone_weights(_read(checkpoint)), checkpoint)


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
    checkpoint = Path(checkpoint)
    found = _read(checkpoint)['state_dict']
    own = ('dino_center.', 'ibot_center.', 'gram_backbone.')
    missing = [key for key in state if key not in found and not key.startswith(own)]
    other = [key for key in state if key in found and found[key].shape != state[key].shape]
    if missing or other:
        raise CheckpointError(
            f'{checkpoint}: cannot be gone on from with this model and these heads: '
            f'{len(missing)} weights are missing, {len(other)} have another shape, such as '
            f'{(missing + other)[0]}'
        )
    return {key: found.get(key, value) for key, value in state.items()}


def export_torchgeo(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write the file that TorchGeo's ``SemanticSegmentation`` takes as *weights*.

    ``Classification`` takes the checkpoint itself. ``SemanticSegmentation`` loads strictly, into
    ``encoder.model``, which ``torchgeo.tasks.utils.extract_backbone`` only yields for a file
    that names a ``backbone``.

    Args:
        checkpoint: Lightning checkpoint of :class:`geofm.tasks.DINOv2`.
        output: File to write.

    Returns:
        The file.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is of another kind.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    content = _read(checkpoint)
    exported = {
        'hyper_parameters': {'backbone': content['hyper_parameters']['model']},
        'state_dict': {
            f'model.backbone.model.model.{key}': value
            for key, value in _backbone_weights(content).items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f'.{output.name}.part')
    torch.save(exported, beside)
    beside.replace(output)
    return output
