"""Steps whose loss or gradient is not finite: said, kept, and done again at will."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geofm.atomic import atomic_file
from geofm.models.weights.trust import one_line
from geofm.tasks.randomness import seeded

if TYPE_CHECKING:
    from geofm.tasks.dinov2 import DINOv2

#: Precisions of Lightning under which a step ran, and what autocast then takes.
AUTOCAST = {'bf16-mixed': torch.bfloat16, '16-mixed': torch.float16}


class DumpError(ValueError):
    """A file is not the dump of a step."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What it takes, beside the weights, to do a training step again.

    Attributes:
        number: Optimiser steps before it.
        batch: The batch, as the task got it.
        seed: Seed of what was drawn for it.
        temperature: Teacher temperature.
        centers: Buffers of the centres before the step.
    """

    number: int
    batch: dict[str, Any]
    seed: int
    temperature: float
    centers: dict[str, Tensor]


def gradient_norms(student: nn.ModuleDict) -> dict[str, Tensor]:
    """Norm of the gradient of each sub-network.

    Args:
        student: The sub-networks by name.

    Returns:
        Norms by name; zero where there is no gradient.
    """
    return {
        name: nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        for name, module in student.items()
    }


def write_dump(task: 'DINOv2', step: Step, values: dict[str, float], folder: Path) -> Path:
    """Keep a step, so that :func:`replay` can do it again.

    Args:
        task: The task, with the weights that the step started from.
        step: The step.
        values: Its loss terms, or the norms of its gradient.
        folder: Where to write ``nonfinite-step<number>-rank<rank>.pt``.

    Returns:
        The file.
    """
    path = folder / f'nonfinite-step{step.number}-rank{task.global_rank}.pt'
    photometry = task.multi_crop.photometry
    content = {
        # What the command line notes beside the arguments is not the task's.
        'hyper_parameters': {k: v for k, v in task.hparams.items() if not k.startswith('_')},
        'state_dict': {**task.state_dict(), **step.centers},
        'batch': {k: v for k, v in step.batch.items() if isinstance(v, Tensor)},
        'step': step.number,
        'seed': step.seed,
        'temperature': step.temperature,
        'precision': str(task.trainer.precision),
        'statistics': None if photometry is None else photometry.statistics(),
        'values': values,
    }
    with atomic_file(path) as part:
        torch.save(content, part)
    return path


def replay(path: Path, device: torch.device | str = 'cpu') -> dict[str, float]:
    """Do a step again whose loss or gradient was not finite.

    Args:
        path: File that the task wrote when it stopped.
        device: Where to compute: on that of the run for the same rounding.

    Returns:
        Loss terms by name, then ``gradient of <sub-network>``.

    Raises:
        DumpError: If the file is no such dump.
    """
    from geofm.tasks.dinov2 import DINOv2

    try:
        dump = torch.load(path, map_location=device, weights_only=True)
        hparams, state = dump['hyper_parameters'], dump['state_dict']
        statistics = dump['statistics']
        # No dump names other files, which would be opened or downloaded.
        task = DINOv2(**{k: v for k, v in hparams.items() if k not in DINOv2.ignore})
    except FileNotFoundError:
        raise
    except Exception as error:
        # A dozen kinds of error, by the kind of file that it is not.
        raise DumpError(f'{path}: not the dump of a step: {one_line(error)}') from error
    if dump['precision'] == '64-true':
        task.double()
    task.load_state_dict(state)
    if task.multi_crop.photometry is not None:
        task.multi_crop.photometry.set_statistics(*statistics)
    task.to(device).train()
    dtype = AUTOCAST.get(dump['precision'])
    with (
        seeded(dump['seed'], task.device),
        torch.autocast(task.device.type, dtype, enabled=dtype is not None),
    ):
        losses, _ = task.losses(dump['batch'], dump['temperature'])
    task.total(losses).backward()
    norms = {f'gradient of {k}': v.item() for k, v in gradient_norms(task.student).items()}
    return {name: value.item() for name, value in losses.items()} | norms
