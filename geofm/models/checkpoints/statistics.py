"""Statistics of the input that are stored in checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geofm.models.checkpoints.definitions import take_up_sensors_of
from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.transforms import InputStatistics

#: Key of the statistics in :data:`~geofm.models.checkpoints.METADATA` of a checkpoint, in the
#: metadata of exported safetensors, and in the state of geofm's data modules.
INPUT = 'input'


def find_statistics(content: Any, path: Path) -> InputStatistics | None:
    """Find the statistics of the input that the weights of a checkpoint were trained with.

    Pretraining tasks and ``geofm export`` store them under
    :data:`~geofm.models.checkpoints.METADATA`. For other tasks they are in the state of the
    data module, which Lightning stores under the name of its class.

    Args:
        content: Result of :func:`~geofm.models.checkpoints.files.read_file`.
        path: The file, for messages.

    Returns:
        The statistics; None if not stored, which means those of :mod:`geofm.sensors`.

    Raises:
        CheckpointError: If they are invalid, or in a unit that this version does not use.
    """
    if not isinstance(content, Mapping):
        return None
    places = [content.get(METADATA), *content.values()]
    entries = (place[INPUT] for place in places if isinstance(place, Mapping) and INPUT in place)
    entry = next(entries, None)
    if entry is None:
        return None
    take_up_sensors_of(content, path)
    try:
        return InputStatistics.from_entry(entry)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(
            f'{path}: the statistics of its input are invalid: {error}'
        ) from error


def carry_statistics(statistics: InputStatistics | None) -> dict[str, Any]:
    """Return what a checkpoint stores about the statistics of the input.

    Args:
        statistics: Statistics of the input; None: unknown.

    Returns:
        The statistics under their key, for :func:`find_statistics`; empty if they are unknown.
    """
    return {} if statistics is None else {INPUT: statistics.entry()}
