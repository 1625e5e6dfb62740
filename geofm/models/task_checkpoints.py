"""Backbones in the checkpoints of TorchGeo's tasks: self-supervised, classification, dense."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import load_state_dict
from torch import Tensor

from geofm.models.weights.files import CheckpointError, read_file

#: How timm is told of a folder whose ``config.json`` names an architecture and its arguments.
LOCAL_DIR = 'local-dir:'

#: Hyperparameter that names the backbone, and what stands before its weights: of the segmentation
#: tasks; of Classification and Regression; of MAE; of SimCLR and MoCo.
_TASKS = (
    ('backbone', 'model.encoder.model.'),
    ('model', 'model.'),
    ('model', 'backbone.vit.'),
    ('model', 'backbone.'),
)


class TaskBackbone(NamedTuple):
    """The backbone of a task.

    Attributes:
        model: Name of the architecture, for ``timm.create_model``.
        model_args: Further arguments of the model.
        weights: Weights by its own names, a head's among them if it has one.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]


def task_backbone(content: Any) -> TaskBackbone | None:
    """Find the backbone in what a Lightning checkpoint of a TorchGeo task holds.

    Args:
        content: What :func:`~geofm.models.weights.files.read_file` gave.

    Returns:
        The backbone, or None if there is none.

    Raises:
        CheckpointError: If the task took its model from a folder that is not there.
    """
    if not isinstance(content, Mapping):
        return None
    hparams, state = content.get('hyper_parameters'), content.get('state_dict')
    if not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
        return None
    for key, prefix in _TASKS:
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if isinstance(hparams.get(key), str) and weights:
            name, model_args = _architecture(hparams[key].removeprefix('tu-'))
            return TaskBackbone(name, model_args, weights)
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of one model.

    Args:
        path: A file of weights, ``.pth`` or ``.safetensors``, or a TorchGeo task's checkpoint.

    Returns:
        Weights by the model's own names.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file')
    try:
        found = task_backbone(read_file(path))
        return load_state_dict(str(path), weights_only=True) if found is None else found.weights
    except Exception as error:
        # A dozen kinds of error, by the kind of file that it is not.
        raise CheckpointError(f'{path}: no readable file of weights: {error}') from error


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a model that may be described in a folder."""
    if not name.startswith(LOCAL_DIR):
        return name, {}
    path = Path(name.removeprefix(LOCAL_DIR)) / 'config.json'
    try:
        config = json.loads(path.read_text())
        return config['architecture'], config.get('model_args', {})
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(
            f'{path}: cannot be read, and the checkpoint of a task names its model there: {error}'
        ) from error
