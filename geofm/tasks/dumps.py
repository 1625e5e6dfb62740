"""Dumps of training steps whose loss or gradient is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from geofm.atomic import atomic_file
from geofm.losses import gathered
from geofm.transforms import Photometry


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Everything needed to repeat a training step, except the weights.

    Attributes:
        number: Number of optimiser steps before this one.
        batch: The batch, as the task received it.
        seed: Seed of the step's random numbers.
        schedule: Values of the schedules at the step.
        state: State before the step, of the part of the task that computing losses changes.
    """

    number: int
    batch: dict[str, Any]
    seed: int
    schedule: dict[str, float]
    state: dict[str, Tensor]


def write_dump(
    task: LightningModule,
    photometry: Photometry | None,
    step: Step,
    values: Mapping[str, float],
    folder: Path,
) -> Path:
    """Write a step to a file from which :func:`geofm.tasks.replay` can repeat it.

    All ranks of a sharded task must call this.

    Args:
        task: The task, with the weights from before the step.
        photometry: The photometry of the task.
        step: The step.
        values: The loss terms, or the norms of the gradient.
        folder: Folder for the file ``nonfinite-step<number>-rank<rank>.pt``.

    Returns:
        The file.
    """
    path = folder / f'nonfinite-step{step.number}-rank{task.global_rank}.pt'
    content = {
        'task': class_path(type(task)),
        # The command line adds entries that are not arguments of the task.
        'hyper_parameters': {k: v for k, v in task.hparams.items() if not k.startswith('_')},
        'state_dict': {
            **{name: gathered(value) for name, value in task.state_dict().items()},
            **step.state,
        },
        'batch': {k: v for k, v in step.batch.items() if isinstance(v, Tensor)},
        'step': step.number,
        'seed': step.seed,
        'schedule': step.schedule,
        'precision': str(task.trainer.precision),
        'statistics': None if photometry is None else photometry.statistics(),
        'values': dict(values),
    }
    with atomic_file(path) as part:
        torch.save(content, part)
    return path


def class_path(cls: type) -> str:
    """Return the name of a class that is stored in a dump.

    Args:
        cls: The class.

    Returns:
        Module and qualified name.
    """
    return f'{cls.__module__}.{cls.__qualname__}'
