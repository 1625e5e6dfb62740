"""What a backbone is built of: carried among its weights, and taken from them when they are loaded.

TorchGeo, timm and segmentation-models-pytorch build a model by its name alone and load weights
afterwards, so neither bands nor ``model_args`` of a checkpoint reach the model. The weights of a
backbone that is part of a task therefore hold one entry more, which names them, and a model that
was built by its name takes from it all that its caller did not ask for.
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
from geofm.sensors import SENSORS, BandError, check_bands, sensor_channels

#: Name of the entry among the weights of a backbone, a string of JSON as bytes.
KEY = ARCHITECTURE

#: Arguments by which timm finds weights and wraps a model; they are none of the model.
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

#: Arguments of a model that are not described: of its input, of its head, of training.
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
    """What a backbone is built of.

    Attributes:
        model: Name of the model.
        bands: Names of its input channels, in their order.
        model_args: Further arguments where they are not the name's own: values of JSON.
        sensors: Keys of the sensors whose definitions are carried.
    """

    model: str
    bands: tuple[str, ...]
    model_args: Mapping[str, Any]
    sensors: tuple[str, ...] = field(default=(), compare=False)

    def to_tensor(self) -> Tensor:
        """What stands among the weights.

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
        """Read what stands among weights, and register the sensors that it defines.

        Args:
            tensor: The bytes.

        Returns:
            The description. Its arguments are such as a file may hold.

        Raises:
            CheckpointError: If it cannot be read, or a sensor that it defines is known otherwise.
        """
        try:
            content = json.loads(bytes(tensor.tolist()))
            definitions = content.get(DEFINITIONS)
            take_up_sensors(definitions, 'the weights')
            model, args = content['model'], content['model_args']
            bands = check_bands(content['bands'])
            if not isinstance(model, str):
                raise TypeError('its name is no text')
            args = check_model_args(args)
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f'the weights hold a description of their model that cannot be read: {error}'
            ) from error
        return cls(model, bands, args, tuple(definitions or ()))


@dataclass(frozen=True, slots=True)
class Request:
    """How a model was asked for by its name.

    Attributes:
        name: The name.
        args: What the caller gave beside it: number and names of bands, and arguments.
        defaults: Arguments of the model of that name where the caller gave none.
    """

    name: str
    args: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def describe(self, bands: tuple[str, ...]) -> Architecture | None:
        """Describe the model.

        Args:
            bands: Names of its input channels.

        Returns:
            The description, or None if the bands are not known or an argument is no value of JSON.
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
        """Arguments in which an architecture of the same name differs from what was asked for.

        Args:
            there: The architecture.

        Returns:
            Its arguments by name.

        Raises:
            CheckpointError: If its name is another one, if the model has no such argument, or if
                the caller asked for another value.
        """
        if there.model != self.name:
            raise CheckpointError(
                f"the weights are of '{there.model}', and cannot be loaded into '{self.name}': "
                'name that model'
            )
        if unknown := sorted(there.model_args.keys() - (self.defaults.keys() - _OTHER)):
            raise CheckpointError(f"'{self.name}' has no arguments {unknown}, as its weights say")
        theirs = {**self.defaults, **there.model_args}
        ours = {**self.defaults, **self.args}
        differing = {k: v for k, v in theirs.items() if k not in _OTHER and not _same(v, ours[k])}
        asked = {key: self.args[key] for key in differing if key in self.args}
        if asked:
            said = {key: differing[key] for key in asked}
            raise CheckpointError(
                f'{asked} was asked for, but the weights are of a model of {said}'
            )
        return differing

    def bands_for(self, there: Architecture, own: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the input channels once the bands of the weights are known.

        Args:
            there: Architecture of the weights.
            own: Names that the model has; none if the number of channels did not tell them.

        Returns:
            The caller's names, if there are any; else those of the weights, all or of one sensor,
            if they are as many as the channels asked for; else the model's own.

        Raises:
            BandError: If the names cannot be known.
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
            f'in_chans={channels} does not tell which bands they are, and the weights are of '
            f'{len(there.bands)}: {list(there.bands)}. Name them with bands=[...]'
        )


def _same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal; a list of JSON is the same as a tuple."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return list(value) == list(other)
    return bool(value == other)


def is_marker(value: Any) -> bool:
    """Whether an entry among weights is no weight, but there to be found by its name.

    Args:
        value: The entry.

    Returns:
        True if it is an empty tensor, see :func:`geofm.models.by_name.description`.
    """
    return isinstance(value, Tensor) and not value.numel()


def unwrap(weights: dict[str, Tensor]) -> None:
    """Of the weights of a task, keep those of its backbone, by the backbone's own names.

    Args:
        weights: Weights by name; changed in place. Those of a backbone stay as they are.
    """
    if KEY in weights or f'model.{KEY}' not in weights:
        return
    for name in list(weights):
        value = weights.pop(name)
        if name.startswith('model.'):
            weights[name.removeprefix('model.')] = value


def misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Say which weights do not go with a model.

    Args:
        own: Weights of the model, by name, on any device.
        weights: Weights that are to be loaded. A head may be missing or too many.

    Returns:
        How many are missing, not used or of another shape, and which; nothing if all fit.
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
