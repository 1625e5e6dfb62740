"""Build the backbone that a checkpoint describes, and load its weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from geofm.models.architecture import KEY
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.checkpoints.model_file import Checkpoint, ModelFile, read_model
from geofm.models.checkpoints.trust import (
    check_model_args,
    check_model_name,
    check_weights,
)
from geofm.models.multisensor import MultiSensorViT
from geofm.models.registry import MODEL_NAMES
from geofm.models.shapes import shapes_only
from geofm.printing import one_line


def load_strictly(backbone: nn.Module, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Load weights into a backbone of the same architecture.

    Args:
        backbone: The backbone; changed in place.
        weights: The weights.
        checkpoint: The file of the weights, for messages.

    Raises:
        CheckpointError: If a weight is missing, unexpected or of another shape.
    """
    check_fit(backbone.state_dict(), weights, checkpoint)
    backbone.load_state_dict(weights)


def check_fit(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    checkpoint: Path,
    model: str = 'the model',
) -> None:
    """Check that weights have the names and shapes of a model's weights.

    Args:
        own: Weights of the model, on any device.
        weights: The weights.
        checkpoint: The file of the weights, for messages.
        model: Name of the model in messages.

    Raises:
        CheckpointError: If a weight is missing, unexpected or of another shape.
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
    """Build the backbone that the hyperparameters of a pretraining task describe.

    Args:
        hparams: Hyperparameters with ``model``, ``in_channels``, ``bands`` and ``model_args``. They
            may be from an untrusted file; nothing is downloaded.
        kwargs: Further arguments of the model.

    Returns:
        The backbone, without a head.

    Raises:
        TypeError: If there is no geofm model of this name.
        ValueError: If an argument of the model is unknown or invalid.
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


def build_backbone(checkpoint: Checkpoint) -> MultiSensorViT:
    """Build the backbone of a checkpoint and load its weights.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The backbone (with an EMA teacher: the teacher's), in evaluation mode.

    Raises:
        CheckpointError: If its hyperparameters describe no model, or its weights do not fit.
    """
    # First on the meta device: a damaged file may describe a model too large for any machine.
    shapes = describe_backbone(checkpoint).state_dict()
    check_fit(shapes, checkpoint.weights, checkpoint.path)
    backbone = create_backbone(checkpoint.hparams)
    load_strictly(backbone, checkpoint.weights, checkpoint.path)
    backbone.statistics = checkpoint.statistics
    return backbone.eval()


def describe_backbone(checkpoint: Checkpoint) -> MultiSensorViT:
    """Build the backbone of a checkpoint on the meta device: shapes without weights.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The backbone.

    Raises:
        CheckpointError: If its hyperparameters describe no model.
    """
    try:
        with shapes_only():
            return create_backbone(checkpoint.hparams)
    except Exception as error:
        # Parts of the model may raise anything for arguments that contradict each other.
        raise CheckpointError(
            f'{checkpoint.path}: its hyperparameters describe no model: {one_line(error)}'
        ) from error


def read_hparams(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the hyperparameters of the task that wrote a checkpoint.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, e.g. :class:`geofm.tasks.DINOv2`,
            or an export of it.

    Returns:
        The hyperparameters by name.

    Raises:
        CheckpointError: If the file cannot be read or is of another kind.
    """
    return read_model(checkpoint).require_pretrained().hparams


def load_backbone(checkpoint: str | os.PathLike[str]) -> MultiSensorViT:
    """Load the pretrained backbone of a checkpoint that ``geofm fit`` wrote.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, e.g. :class:`geofm.tasks.DINOv2`;
            a file that ``geofm export`` wrote with ``--to geofm``, ``--to torchgeo`` or ``--to
            hub``; or the name of weights that come with the package, e.g. 'eurosat-rgb-nano'.

    Returns:
        The backbone (with an EMA teacher: the teacher's), in evaluation mode. Its ``statistics``
        say how to normalise its input.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    return build_backbone(read_model(checkpoint).require_pretrained())


def read_task_weights(
    checkpoint: str | os.PathLike[str] | ModelFile,
    state: Mapping[str, Tensor],
    optional: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Read the weights of a whole task (student, teacher and heads) to continue training with.

    Args:
        checkpoint: Lightning checkpoint of the same task, e.g. :class:`geofm.tasks.DINOv2`.
        state: State dict of the task to load into.
        optional: Prefixes of weights that the checkpoint may lack, e.g. those of a Gram teacher.
            Missing ones are taken from *state*.

    Returns:
        Weights for the task's ``load_state_dict``.

    Raises:
        CheckpointError: If the file cannot be read, is of another kind, or does not fit.
    """
    file = read_model(checkpoint)
    file.require_pretrained()
    found = check_weights(file.content['state_dict'], file.path)
    weights = [key for key in state if key.rsplit('.', 1)[-1] != KEY]
    missing = [key for key in weights if key not in found and not key.startswith(optional)]
    other = [key for key in weights if key in found and found[key].shape != state[key].shape]
    if missing or other:
        raise CheckpointError(
            f'{file.path}: does not fit this model and these heads: '
            f'{len(missing)} weights are missing, {len(other)} have another shape, such as '
            f'{(missing + other)[0]}'
        )
    return {key: found.get(key, state[key]) for key in weights}
