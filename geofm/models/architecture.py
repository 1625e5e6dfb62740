"""Architecture of a backbone, stored with its weights and restored when they are loaded.

TorchGeo, timm and segmentation-models-pytorch build a model by its name alone and load weights
afterwards, so neither bands nor ``model_args`` of a checkpoint reach the model. The state dict of a
task with a backbone therefore has an additional entry with this description. A model that was built
by name takes from it everything that its caller did not specify.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.definitions import (
    ARCHITECTURE,
    DEFINITIONS,
    carry_sensors,
    take_up_sensors,
)
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.checkpoints.trust import check_model_args
from geofm.printing import counted
from geofm.sensors import SENSORS, BandError, check_bands, sensor_channels

#: Name of the entry in the state dict, a JSON string as bytes.
KEY = ARCHITECTURE

#: Arguments with which timm finds weights and wraps a model. They are not passed to the model.
TIMM_ARGS = {
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_model_args',
    'pretrained_strict',
    'cache_dir',
    'features_only',
    'feature_cfg',
    'out_indices',
}

#: Arguments that are not part of an architecture: of the input, the head, and training.
_OTHER = {
    'in_chans',
    'bands',
    'num_classes',
    'drop_rate',
    'drop_path_rate',
    'pos_drop_rate',
    'patch_drop_rate',
    'proj_drop_rate',
    'attn_drop_rate',
    'weight_init',
    'fix_init',
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Architecture of a backbone.

    Attributes:
        model: Name of the model.
        bands: Names of the input channels, in their order.
        model_args: Arguments that differ from the defaults of the model's name: JSON values.
        sensors: Keys of the sensors whose definitions are stored.
    """

    model: str
    bands: tuple[str, ...]
    model_args: Mapping[str, Any]
    sensors: tuple[str, ...] = field(default=(), compare=False)

    def to_tensor(self) -> Tensor:
        """Convert to an entry of a state dict.

        Returns:
            The description as bytes, uint8 of shape (N,).
        """
        content: dict[str, Any] = {
            'model': self.model,
            'bands': self.bands,
            'model_args': self.model_args,
        }
        if self.sensors:
            content |= carry_sensors(self.sensors)
        # Keys are not sorted: the order of the sensors matters.
        text = json.dumps(content)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device='cpu')

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> 'Architecture':
        """Read an entry of a state dict, and register the sensors that it defines.

        Args:
            tensor: The bytes.

        Returns:
            The description. Its arguments have been checked.

        Raises:
            CheckpointError: If it is invalid, or it contradicts the definition of a known sensor.
        """
        try:
            content = json.loads(bytes(tensor.tolist()))
            definitions = content.get(DEFINITIONS)
            take_up_sensors(definitions, 'the weights')
            model, args = content['model'], content['model_args']
            bands = check_bands(content['bands'])
            if not isinstance(model, str):
                raise TypeError('the name of the model is not a string')
            args = check_model_args(args)
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f'the weights have an invalid description of their model: {error}'
            ) from error
        return cls(model, bands, args, tuple(definitions or ()))


@dataclass(frozen=True, slots=True)
class Request:
    """Name and arguments with which a caller built a model.

    Attributes:
        name: Name of the model.
        args: Arguments that the caller gave, including the number and names of bands.
        defaults: Default arguments of the model of that name.
    """

    name: str
    args: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def describe(self, bands: tuple[str, ...]) -> Architecture | None:
        """Describe the model.

        Args:
            bands: Names of the input channels.

        Returns:
            The description; None if the bands are unknown or an argument is not a JSON value.
        """
        given = {key: value for key, value in self.args.items() if key not in _OTHER}
        try:
            plain = json.loads(json.dumps(given))
        except TypeError:
            return None
        own = {key: value for key, value in plain.items() if value != self.defaults.get(key)}
        sensors = {**self.defaults, **self.args}['sensors']
        used = tuple(key for key in SENSORS if key in sensors)
        return Architecture(self.name, bands, own, used) if bands else None

    def differences(self, there: Architecture) -> dict[str, Any]:
        """Find the arguments in which an architecture differs from the defaults of this request.

        Args:
            there: The architecture.

        Returns:
            The differing arguments of the architecture by name.

        Raises:
            CheckpointError: If the names differ, if the model does not have an argument, or if it
                differs in an argument that the caller gave.
        """
        if there.model != self.name:
            raise CheckpointError(
                f"the weights are of '{there.model}' and cannot be loaded into '{self.name}': "
                'give the name of that model'
            )
        if unknown := sorted(there.model_args.keys() - (self.defaults.keys() - _OTHER)):
            raise CheckpointError(f"the weights have arguments {unknown}, unknown to '{self.name}'")
        theirs = {**self.defaults, **there.model_args}
        ours = {**self.defaults, **self.args}
        differing = {k: v for k, v in theirs.items() if k not in _OTHER and not _same(v, ours[k])}
        asked = {key: self.args[key] for key in differing if key in self.args}
        if asked:
            said = {key: differing[key] for key in asked}
            raise CheckpointError(
                f'the arguments {asked} were given, but the weights are of a model with {said}'
            )
        return differing

    def bands_for(self, there: Architecture, own: tuple[str, ...]) -> tuple[str, ...]:
        """Determine the names of the input channels from the bands of weights.

        Args:
            there: Architecture of the weights.
            own: Bands of the model; empty if they are unknown.

        Returns:
            The bands that the caller gave, if any. Otherwise the bands of the weights, all or those
            of one sensor, if their number is that of the channels; otherwise the model's bands.

        Raises:
            BandError: If the bands cannot be determined.
        """
        if 'bands' in self.args:
            return own
        channels = self.args.get('in_chans', len(there.bands))
        by_sensor = sensor_channels(there.bands).values()
        choices = [there.bands, *(tuple(there.bands[i] for i in part) for part in by_sensor)]
        for choice in choices:
            if len(choice) == channels:
                return choice
        if own:
            return own
        raise BandError(
            f'the bands of the {channels} channels (in_chans) are unknown, and the weights have '
            f'{counted(len(there.bands), "band")}: {list(there.bands)}. Name the bands '
            'with bands=[...]'
        )


def _same(value: Any, other: Any) -> bool:
    """Return whether two arguments are equal. A list (from JSON) equals a tuple."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return list(value) == list(other)
    return bool(value == other)


def is_marker(value: Any) -> bool:
    """Return whether an entry of a state dict is a marker and not a weight.

    Args:
        value: The entry.

    Returns:
        True for an empty tensor, see :func:`geofm.models.by_name.description`.
    """
    return isinstance(value, Tensor) and not value.numel()


def unwrap(weights: dict[str, Tensor]) -> None:
    """Reduce the weights of a task to those of its backbone, under the backbone's own names.

    Args:
        weights: Weights by name; changed in place. Weights of a backbone are left as they are.
    """
    if KEY in weights or f'model.{KEY}' not in weights:
        return
    for name in list(weights):
        value = weights.pop(name)
        if name.startswith('model.'):
            weights[name.removeprefix('model.')] = value


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Describe which weights do not fit a model.

    Args:
        own: Weights of the model by name, on any device.
        weights: Weights to load. A head is ignored.

    Returns:
        Number and examples of weights that are missing, unused or of another shape; an empty string
        if all fit.
    """
    found = {
        'missing': sorted(own.keys() - weights.keys()),
        'not used': sorted(weights.keys() - own.keys()),
        'of another shape': [
            name for name in own if name in weights and own[name].shape != weights[name].shape
        ],
    }
    parts = [
        f'{len(rest)} are {what}, such as {rest[0]}'
        for what, every in found.items()
        if (rest := [name for name in every if not name.startswith('head.')])
    ]
    return f'of {len(own)} weights {", ".join(parts)}' if parts else ''
