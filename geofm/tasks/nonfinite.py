"""Repeat training steps whose loss or gradient was not finite."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from geofm.printing import one_line
from geofm.tasks.dumps import class_path
from geofm.tasks.parameters import AUTOCAST, gradient_norms
from geofm.tasks.pretraining import PretrainingTask
from geofm.tasks.randomness import seeded


class DumpError(ValueError):
    """Raised when a file is not a dump of a training step, or cannot be replayed."""


def replay(
    path: Path, device: torch.device | str = 'cpu', files: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Repeat a training step whose loss or gradient was not finite.

    Args:
        path: File that the task wrote when it stopped.
        device: Device to compute on. Use the device of the run for the same rounding.
        files: Arguments of the task that name files, such as ``teacher``, if the step needs them. A
            dump itself cannot cause files to be opened.

    Returns:
        Loss terms by name, then gradient norms as ``gradient of <sub-network>``.

    Raises:
        DumpError: If the file is not a dump, or the class of its task is not imported.
    """
    try:
        dump = torch.load(path, map_location=device, weights_only=True)
        name, hparams, state = dump['task'], dump['hyper_parameters'], dump['state_dict']
        statistics = dump['statistics']
        # Nothing is imported for a dump, because that would run code.
        cls = {class_path(known): known for known in _subclasses(PretrainingTask)}.get(name)
        if cls is None:
            raise DumpError(f'its task {name} is not imported: import it before calling replay')
        # A dump must not name files, which would be opened or downloaded.
        task = cls(**{k: v for k, v in hparams.items() if k not in cls.ignore}, **(files or {}))
    except FileNotFoundError:
        raise
    except Exception as error:
        # Unsuitable files may raise many kinds of errors.
        raise DumpError(f'{path}: not a dump of a training step: {one_line(error)}') from error
    if dump['precision'] == '64-true':
        task.double()
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        raise DumpError(
            f'{path}: its weights do not fit the task. If the run had a teacher, give its '
            f'configuration: geofm replay FILE --run CONFIG. {one_line(error)}'
        ) from error
    if task.multi_crop.photometry is not None:
        task.multi_crop.photometry.set_statistics(*statistics)
    task.to(device).train()
    dtype = AUTOCAST.get(dump['precision'])
    with (
        seeded(dump['seed'], task.device),
        torch.autocast(task.device.type, dtype, enabled=dtype is not None),
    ):
        losses, _ = task.compute_losses(dump['batch'], dump['schedule'])
    task.total(losses).backward()
    norms = {f'gradient of {k}': v.item() for k, v in gradient_norms(task.trained).items()}
    return {name: value.item() for name, value in losses.items()} | norms


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
