"""Backbones in the checkpoints of TorchGeo's tasks: self-supervised, classification, dense."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import load_state_dict
from torch import Tensor

from geofm.models.architecture import is_marker
from geofm.models.weights.carried import find_statistics
from geofm.models.weights.files import CheckpointError, read_file
from geofm.models.weights.hub_args import check_hub_args
from geofm.models.weights.trust import (
    check_model_name,
    check_weights,
    one_line,
)
from geofm.transforms.statistics import InputStatistics

#: How timm is told of a folder whose ``config.json`` names an architecture and its arguments.
LOCAL_DIR = 'local-dir:'

#: Most bytes of such a ``config.json``.
_LARGEST_CONFIG = 100_000

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
        weights: Weights by its own names, a head's among them if it has one; all finite.
        statistics: How its input was normalised; None if the checkpoint does not say.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: InputStatistics | None = None


def task_backbone(content: Any, path: Path) -> TaskBackbone | None:
    """Find the backbone in what a Lightning checkpoint of a TorchGeo task holds.

    Args:
        content: What :func:`~geofm.models.weights.files.read_file` gave.
        path: The file, for messages.

    Returns:
        The backbone, or None if there is none.

    Raises:
        CheckpointError: If the task took its model from a folder that is not there, the model is
            not a registered one, or a weight is not finite.
    """
    if not isinstance(content, Mapping):
        return None
    hparams, state = content.get('hyper_parameters'), content.get('state_dict')
    if not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
        return None
    for key, prefix in _TASKS:
        weights = {
            k.removeprefix(prefix): v
            for k, v in state.items()
            if isinstance(k, str) and k.startswith(prefix) and not is_marker(v)
        }
        if isinstance(hparams.get(key), str) and weights:
            try:
                name, model_args = _architecture(hparams[key].removeprefix('tu-'))
            except ValueError as error:
                raise CheckpointError(f'{path}: {one_line(error)}') from error
            statistics = find_statistics(content, path)
            return TaskBackbone(name, model_args, check_weights(weights, path), statistics)
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
    found = task_backbone(read_file(path), path)
    if found is not None:
        return found.weights
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # A dozen kinds of error, by the kind of file that it is not.
        raise CheckpointError(f'{path}: no readable file of weights: {one_line(error)}') from error
    return check_weights(weights, path)


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a model that may be described in a folder; both are checked."""
    if not name.startswith(LOCAL_DIR):
        return check_model_name(name), {}
    path = Path(name.removeprefix(LOCAL_DIR)) / 'config.json'
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError('not a small file')
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError('not a JSON object')
        return (
            check_model_name(config.get('architecture')),
            check_hub_args(config.get('model_args'), str(path)),
        )
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{ascii(str(path))[1:-1]}: cannot be used, and the checkpoint of a task names its '
            f'model there: {one_line(error)}'
        ) from error
