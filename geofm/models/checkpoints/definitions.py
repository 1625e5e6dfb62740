"""Definitions of sensors that a checkpoint carries, so that it loads where they are not known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.sensors import SENSORS, register_sensors

#: Name of the entry among the weights of a backbone that describes it, JSON as bytes.
ARCHITECTURE = 'architecture'

#: Key of the definitions there and in a file's :data:`~geofm.models.checkpoints.files.METADATA`.
DEFINITIONS = 'sensors'

#: Most sensors, and most bands of all of them, that a file may define.
_MOST_SENSORS, _MOST_BANDS = 64, 4096


def carry_sensors(sensors: Sequence[str]) -> dict[str, Any]:
    """What to write into a file of a model.

    Args:
        sensors: Keys of the model's sensors, in canonical order.

    Returns:
        An entry with their definitions, plain data.
    """
    return {DEFINITIONS: {key: SENSORS[key].to_dict() for key in sensors}}


def take_up_sensors(definitions: Any, source: str) -> None:
    """Register the sensors that a file defines.

    Args:
        definitions: The value of the entry of :func:`carry_sensors`; not trusted. None: nothing.
        source: What a message calls the file.

    Raises:
        CheckpointError: If a definition is invalid, another sensor is registered under its key, or
            the sensors are registered in another order than that of the file.
    """
    if definitions is None:
        return
    if not isinstance(definitions, Mapping) or not 1 <= len(definitions) <= _MOST_SENSORS:
        raise CheckpointError(f'{source}: the definitions of its sensors are damaged')
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
            f'{source}: its model has the sensors in the order {list(keys)}, but they were '
            f'registered as {here}: define them in that order'
        )


def take_up_sensors_of(content: Any, path: Path) -> None:
    """Register the sensors that a checkpoint or an export defines, if it does.

    Args:
        content: What :func:`~geofm.models.checkpoints.files.read_file` gave.
        path: The file, for messages.

    Raises:
        CheckpointError: As :func:`take_up_sensors`.
    """
    if not isinstance(content, Mapping):
        return
    metadata, state = content.get(METADATA), content.get('state_dict')
    if isinstance(metadata, Mapping):
        take_up_sensors(metadata.get(DEFINITIONS), str(path))
    if not isinstance(state, Mapping):
        return
    # Those of student, teacher and others are equal.
    for record in {_record(name, value) for name, value in state.items()} - {None}:
        assert record is not None
        try:
            said = json.loads(record)
        except (ValueError, RecursionError):
            # The model that the record is for says what is wrong with it.
            continue
        if isinstance(said, Mapping):
            take_up_sensors(said.get(DEFINITIONS), str(path))


def _record(name: Any, value: Any) -> bytes | None:
    """The description of a backbone, if an entry of a state dictionary is one."""
    if not isinstance(name, str) or name.rsplit('.', 1)[-1] != ARCHITECTURE:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        return None
    return bytes(value.tolist())
