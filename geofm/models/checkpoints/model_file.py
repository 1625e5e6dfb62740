"""Which model a file holds: :func:`read_model` reads the file once, and the result is passed on."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from timm.models import clean_state_dict
from torch import Tensor

from geofm.models.architecture import KEY, is_marker
from geofm.models.checkpoints.definitions import take_up_sensors_of
from geofm.models.checkpoints.files import METADATA, CheckpointError, read_file
from geofm.models.checkpoints.hub_args import check_hub_args
from geofm.models.checkpoints.statistics import find_statistics
from geofm.models.checkpoints.trust import (
    check_model_args,
    check_model_name,
    check_weights,
)
from geofm.models.registry import MODEL_NAMES
from geofm.printing import one_line
from geofm.sensors import check_bands
from geofm.transforms import InputStatistics

#: Prefix of the backbone's weights in the checkpoint of a pretraining task.
PREFIX = 'model.'

#: Prefix with which timm names a folder whose ``config.json`` gives an architecture and arguments.
LOCAL_DIR = 'local-dir:'

#: Largest size of such a ``config.json``, in bytes.
_LARGEST_CONFIG = 100_000

#: Hyperparameters that describe a pretrained backbone. TorchGeo's tasks have only some of them.
_DESCRIBED = {'model', 'in_channels', 'bands', 'model_args'}

#: Names of weights of blocks, with the number of the block.
_BLOCK = re.compile(r'encoders\.\w+\.blocks\.(\d+)\.')

#: Hyperparameter that names the backbone of a TorchGeo task, and prefix of its weights:
#: segmentation tasks; Classification and Regression; MAE; SimCLR and MoCo.
_TASKS = (
    ('backbone', 'model.encoder.model.'),
    ('model', 'model.'),
    ('model', 'backbone.vit.'),
    ('model', 'backbone.'),
)

#: Keys under which training scripts store a model's weights, in timm's order of preference.
_STATES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


class Checkpoint(NamedTuple):
    """Pretrained backbone in the checkpoint of a pretraining task, or in an export of it.

    Attributes:
        path: The file.
        hparams: Hyperparameters of the task; those of the backbone are checked.
        weights: Weights of the backbone under its own names, all finite.
        statistics: How its input was normalised; None if the file does not say.
    """

    path: Path
    hparams: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: InputStatistics | None = None


class TaskBackbone(NamedTuple):
    """Backbone in the checkpoint of a TorchGeo task.

    Attributes:
        model: Name of the architecture, for ``timm.create_model``.
        model_args: Further arguments of the model.
        weights: Weights under the model's own names, with those of its head if any; all finite.
        statistics: How its input was normalised; None if the file does not say.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: InputStatistics | None = None


@dataclass(frozen=True)
class ModelFile:
    """File of a model, read once. Each property is checked when it is first used.

    Attributes:
        path: The file.
        content: What :func:`~geofm.models.checkpoints.files.read_file` returned.
    """

    path: Path
    content: Any

    @cached_property
    def pretrained(self) -> Checkpoint | None:
        """The pretrained backbone of a pretraining task or an export; None for other files.

        Raises:
            CheckpointError: If the file's description of the backbone is invalid, or its weights
                are not finite.
        """
        content, path = self.content, self.path
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
        weights = _stripped(content['state_dict'], prefix)
        weights.pop(KEY, None)
        if not weights:
            return None
        take_up_sensors_of(content, path)
        hparams = _checked(hparams, weights, path)
        return Checkpoint(path, hparams, check_weights(weights, path), self.statistics)

    def require_pretrained(self) -> Checkpoint:
        """Return the pretrained backbone, or say why there is none.

        Returns:
            The backbone.

        Raises:
            CheckpointError: If the file is of another kind, or invalid.
        """
        if self.pretrained is not None:
            return self.pretrained
        if isinstance(self.content, Mapping) and {'state_dict', 'hyper_parameters'} <= set(
            self.content
        ):
            raise CheckpointError(
                f'{self.path}: a checkpoint of another task, without a pretrained backbone. '
                'Give a checkpoint of a pretraining task, such as geofm.tasks.DINOv2'
            )
        raise CheckpointError(
            f'{self.path}: not a Lightning checkpoint with hyperparameters. '
            'Give a .ckpt that `geofm fit` wrote, or an export of it (`geofm export --to geofm`)'
        )

    @cached_property
    def task(self) -> TaskBackbone | None:
        """The backbone of a TorchGeo task in a Lightning checkpoint; None for other files.

        Raises:
            CheckpointError: If the task names a model folder that does not exist, the model is not
                registered, or a weight is not finite.
        """
        if not isinstance(self.content, Mapping):
            return None
        hparams, state = self.content.get('hyper_parameters'), self.content.get('state_dict')
        if not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
            return None
        for key, prefix in _TASKS:
            weights = _stripped(state, prefix)
            if isinstance(hparams.get(key), str) and weights:
                try:
                    name, model_args = _architecture(hparams[key].removeprefix('tu-'))
                except ValueError as error:
                    raise CheckpointError(f'{self.path}: {one_line(error)}') from error
                weights = check_weights(weights, self.path)
                return TaskBackbone(name, model_args, weights, self.statistics)
        return None

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights under the names of the model's parameters.

        In a checkpoint of a TorchGeo task, those of the backbone; otherwise all in the file.

        Raises:
            CheckpointError: If the file holds no weights, or a weight is not finite.
        """
        if self.task is not None:
            return self.task.weights
        state = self.content
        if isinstance(state, Mapping):
            state = next((state[key] for key in _STATES if state.get(key) is not None), state)
        if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(f'{self.path}: contains no weights of a model')
        return check_weights(clean_state_dict(dict(state)), self.path)

    @cached_property
    def statistics(self) -> InputStatistics | None:
        """Statistics of the input that the weights were trained with; None if not stated.

        Raises:
            CheckpointError: If they are damaged.
        """
        return find_statistics(self.content, self.path)


def read_model(path: str | os.PathLike[str] | ModelFile) -> ModelFile:
    """Read a file of a model.

    Args:
        path: A checkpoint, an export, a file of weights, or the name of weights that come with the
            package; see :func:`~geofm.models.checkpoints.files.read_file`. A file that was read
            before is returned as it is.

    Returns:
        The file.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if isinstance(path, ModelFile):
        return path
    return ModelFile(Path(path), read_file(Path(path)))


def _stripped(state: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """Select weights by the prefix of their names, and remove the prefix."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(prefix) and not is_marker(value)
    }


def _checked(hparams: Mapping[str, Any], weights: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check the hyperparameters of a backbone, and return all hyperparameters."""
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


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Check and return name and arguments of a model, which a folder may describe."""
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
