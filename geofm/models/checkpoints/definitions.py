"""Sensor definitions in checkpoints, so that a checkpoint loads where its sensors are unknown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.sensors import SENSORS, register_sensors

#: Name of the entry in a state dict that describes a backbone, JSON as bytes.
ARCHITECTURE = 'architecture'

#: Key of the definitions in that entry and in :data:`~geofm.models.checkpoints.METADATA`.
DEFINITIONS = 'sensors'

#: Largest number of sensors, and of bands of all sensors, that a file may define.
_MOST_SENSORS, _MOST_BANDS = 64, 4096


def carry_sensors(sensors: Sequence[str]) -> dict[str, Any]:
    """Return the definitions of sensors for a file of a model.

    Args:
        sensors: Keys of the model's sensors, in canonical order.

    Returns:
        An entry with the definitions as plain values.
    """
    return {DEFINITIONS: {key: SENSORS[key].to_dict() for key in sensors}}


def take_up_sensors(definitions: Any, source: str) -> None:
    """Register the sensors that a file defines.

    Args:
        definitions: Definitions by key, as read from a file with those of :func:`carry_sensors`;
            not trusted. None: do nothing.
        source: Name of the file in messages.

    Raises:
        CheckpointError: If a definition is invalid, another sensor is registered under its key, or
            the sensors are registered in another order than in the file.
    """
    if definitions is None:
        return
    if not isinstance(definitions, Mapping) or not 1 <= len(definitions) <= _MOST_SENSORS:
        raise CheckpointError(f'{source}: the definitions of its sensors are invalid')
    bands = (fields.get('bands') for fields in definitions.values() if isinstance(fields, Mapping))
    if sum(len(part) for part in bands if isinstance(part, list | tuple)) > _MOST_BANDS:
        raise CheckpointError(f'{source}: defines more than {_MOST_BANDS} bands')
    try:
        keys = register_sensors(definitions, source)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(str(error)) from error
    here = [key for key in SENSORS if key in keys]
    if here != list(keys):
        raise CheckpointError(
            f'{source}: its model has the sensors in the order {list(keys)}, but they are '
            f'registered in the order {here}: define them in the order of the model'
        )


def take_up_sensors_of(content: Any, path: Path) -> None:
    """Register the sensors that a checkpoint or an export defines, if any.

    Args:
        content: Result of :func:`~geofm.models.checkpoints.files.read_file`.
        path: The file, for messages.

    Raises:
        CheckpointError: As for :func:`take_up_sensors`.
    """
    if not isinstance(content, Mapping):
        return
    metadata, state = content.get(METADATA), content.get('state_dict')
    if isinstance(metadata, Mapping):
        take_up_sensors(metadata.get(DEFINITIONS), str(path))
    if not isinstance(state, Mapping):
        return
    # The descriptions of student, teacher and other backbones are equal.
    for record in {_record(name, value) for name, value in state.items()} - {None}:
        assert record is not None
        try:
            said = json.loads(record)
        except (ValueError, RecursionError):
            # Loading the model raises a better error for this record.
            continue
        if isinstance(said, Mapping):
            take_up_sensors(said.get(DEFINITIONS), str(path))


def _record(name: Any, value: Any) -> bytes | None:
    """Return an entry of a state dict if it is the description of a backbone."""
    if not isinstance(name, str) or name.rsplit('.', 1)[-1] != ARCHITECTURE:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        return None
    return bytes(value.tolist())
