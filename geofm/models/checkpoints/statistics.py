"""What a checkpoint carries of its weights beside them: the statistics of their input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geofm.models.checkpoints.definitions import take_up_sensors_of
from geofm.models.checkpoints.files import METADATA, CheckpointError
from geofm.transforms.statistics import InputStatistics

#: Key of the statistics in a checkpoint's :data:`~geofm.models.checkpoints.files.METADATA`, in the
#: metadata of exported safetensors, and in the state of this project's data modules.
INPUT = 'input'


def find_statistics(content: Any, path: Path) -> InputStatistics | None:
    """Find the statistics of the input that a checkpoint's weights were trained with.

    They are in the checkpoint's entry :data:`~geofm.models.checkpoints.files.METADATA`, which
    :class:`geofm.tasks.DINOv2` and ``geofm export`` write; or else, whatever the task, in the state
    of the data module, which Lightning keeps under the name of its class.

    Args:
        content: What :func:`~geofm.models.checkpoints.files.read_file` gave.
        path: The file, for messages.

    Returns:
        The statistics; None if the file does not say: those of :mod:`geofm.sensors`.

    Raises:
        CheckpointError: If they are damaged, or in another unit than this version's.
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
            f'{path}: the statistics of its input are damaged: {error}'
        ) from error


def carry_statistics(statistics: InputStatistics | None) -> dict[str, Any]:
    """What to write into a file's :data:`~geofm.models.checkpoints.files.METADATA`.

    Args:
        statistics: How the input of the weights was normalised; None: not known.

    Returns:
        An entry for :func:`find_statistics`, or none.
    """
    return {} if statistics is None else {INPUT: statistics.entry()}
