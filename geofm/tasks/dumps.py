"""What is kept of a training step whose loss or gradient is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from geofm.atomic import atomic_file
from geofm.losses.ranks import gathered
from geofm.transforms.photometry import Photometry


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What it takes, beside the weights, to do a training step again.

    Attributes:
        number: Optimiser steps before it.
        batch: The batch, as the task got it.
        seed: Seed of what was drawn for it.
        schedule: Values of the schedules at the step.
        state: Entries of the task's state that computing the losses changes, as before the step.
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
    """Keep a step, so that :func:`geofm.tasks.nonfinite.replay` can do it again.

    Of a task that is sharded, all ranks take part.

    Args:
        task: The task, with the weights that the step started from.
        photometry: Its photometry.
        step: The step.
        values: Its loss terms, or the norms of its gradient.
        folder: Where to write ``nonfinite-step<number>-rank<rank>.pt``.

    Returns:
        The file.
    """
    path = folder / f'nonfinite-step{step.number}-rank{task.global_rank}.pt'
    content = {
        'task': class_path(type(task)),
        # What the command line notes beside the arguments is not the task's.
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
    """Name of a class, as a dump has it.

    Args:
        cls: The class.

    Returns:
        Its module and name.
    """
    return f'{cls.__module__}.{cls.__qualname__}'
