"""Arguments in ``config.json`` of a hub folder, in addition to those of the architecture."""

from typing import Any

from geofm.models.checkpoints.definitions import take_up_sensors
from geofm.models.checkpoints.trust import check_model_args
from geofm.transforms import InputStatistics

#: Key of the definitions of the model's sensors.
DEFINED = 'sensor_definitions'

#: Key of an entry of :class:`~geofm.transforms.InputStatistics`.
STATISTICS = 'input_statistics'

#: Arguments of the input and the head, which are checked where they are used.
_INPUT = ('in_chans', 'bands', 'num_classes')


def take_hub_args(args: dict[str, Any], source: str) -> InputStatistics | None:
    """Remove sensor definitions and statistics from arguments, and register the sensors.

    Args:
        args: Arguments of a model; not trusted. Changed in place.
        source: Name of the folder in messages.

    Returns:
        The statistics of the input; None if there are none.

    Raises:
        CheckpointError: If a definition is invalid, or contradicts a registered sensor.
        ValueError: If the statistics are invalid.
    """
    if DEFINED not in args and STATISTICS not in args:
        return None
    take_up_sensors(args.pop(DEFINED, None), source)
    entry = args.pop(STATISTICS, None)
    return None if entry is None else InputStatistics.from_entry(entry)


def check_hub_args(args: Any, source: str) -> dict[str, Any]:
    """Check the ``model_args`` of a ``config.json``, and register the sensors that it defines.

    Args:
        args: The arguments; not trusted. None: none.
        source: Name of the file in messages.

    Returns:
        The arguments of the architecture.

    Raises:
        CheckpointError: As for :func:`take_hub_args`.
        ValueError: If an argument is unknown or invalid.
    """
    if not isinstance(args, dict) or not {DEFINED, STATISTICS} & args.keys():
        return check_model_args(args)
    kept = dict(args)
    take_hub_args(kept, source)
    return check_model_args({key: value for key, value in kept.items() if key not in _INPUT})
