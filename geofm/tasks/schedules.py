"""DINOv2's schedules: one value per optimiser step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geofm.printing import counted, warn

FloatArray = npt.NDArray[np.float64]


def cosine_schedule(
    base: float,
    final: float,
    steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
    places: FloatArray | None = None,
) -> FloatArray:
    """Compute a schedule with linear warm-up followed by a half cosine.

    Args:
        base: Value at the end of the warm-up.
        final: Value at the end of the cosine.
        steps: Length of the schedule in steps, including the warm-up.
        warmup_steps: Length of the warm-up in steps.
        start: First value of the warm-up.
        places: Positions of the values in steps, at least 0, possibly fractional, of shape (N,).
            Default: all steps.

    Returns:
        Values of shape (N,). At position i after the warm-up the value is
        ``final + (base - final) * (1 + cos(pi * i / n)) / 2``, where n is the number of steps after
        the warm-up.
    """
    places = np.arange(float(steps)) if places is None else places
    phase = np.clip((places - warmup_steps) / max(1, steps - warmup_steps), 0, 1)
    cosine = final + (base - final) * (1 + np.cos(np.pi * phase)) / 2
    if not warmup_steps:
        return cosine
    line = np.interp(places, np.arange(warmup_steps), np.linspace(start, base, warmup_steps))
    return np.where(places < warmup_steps, line, cosine)


@dataclass(frozen=True)
class Schedules:
    """Schedules of a run. Each array has one value per optimiser step.

    Attributes:
        lr: Learning rate.
        last_layer_lr: Learning rate of the heads' last layers: 0 while they are frozen.
        weight_decay: Weight decay.
        momentum: Momentum of the teacher; empty without a teacher.
        teacher_temperature: Temperature of the teacher's softmax; empty without a teacher.
        final: Final value by name, used after the end of the arrays.
        first: Optimiser step of the first value, at which a run is resumed.
    """

    lr: FloatArray
    last_layer_lr: FloatArray
    weight_decay: FloatArray
    momentum: FloatArray
    teacher_temperature: FloatArray
    final: Mapping[str, float]
    first: int = 0

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.lr)

    def at(self, step: int) -> dict[str, float]:
        """Return the values of a step, or the final values after the end.

        Args:
            step: Optimiser step, from 0.

        Returns:
            Values by name.
        """
        place = max(0, step - self.first)
        if place >= len(self):
            return dict(self.final)
        return {name: float(getattr(self, name)[place]) for name in self.final}


def dinov2_schedules(
    steps: int,
    steps_per_epoch: float,
    *,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    weight_decay: tuple[float, float],
    freeze_last_layer_epochs: float = 0,
    momentum: tuple[float, float] | None = None,
    teacher_temperature: tuple[float, float] | None = None,
    warmup_teacher_temperature_epochs: float = 0,
    places: FloatArray | None = None,
    first: int = 0,
) -> Schedules:
    """Compute the schedules of DINOv2 (Oquab et al., 2023).

    Args:
        steps: Number of optimiser steps of the whole run.
        steps_per_epoch: Number of optimiser steps per epoch.
        lr: Peak learning rate.
        min_lr: Final learning rate.
        warmup_epochs: Epochs of the learning rate's warm-up from 0.
        weight_decay: Initial and final weight decay of a cosine schedule.
        freeze_last_layer_epochs: Epochs in which the last layers of the heads are frozen.
        momentum: Initial and final momentum of a cosine schedule; None: no teacher.
        teacher_temperature: Initial and final temperature of a linear schedule; None: no
            temperature.
        warmup_teacher_temperature_epochs: Epochs in which the temperature rises.
        places: Positions of the values, see :func:`cosine_schedule`.
        first: Optimiser step of the first position.

    Returns:
        The schedules.

    Warns:
        UserWarning: If a warm-up takes the whole run, or would take longer and is cut.
    """

    def in_steps(epochs: float, name: str) -> int:
        wanted = round(epochs * steps_per_epoch)
        if wanted > steps:
            warn(
                f'{name}={epochs:g} are {counted(wanted, "step")}, but the run has only {steps}, '
                'to which it is cut. Set a smaller value, or set samples_per_epoch'
            )
        elif wanted == steps > 0:
            warn(
                f'{name}={epochs:g} are {counted(wanted, "step")}, which is the whole run. Set a '
                'smaller value, or set samples_per_epoch'
            )
        return min(wanted, steps)

    places = np.arange(float(steps)) if places is None else places
    warmup = in_steps(warmup_epochs, 'warmup_epochs')
    rates = cosine_schedule(lr, min_lr, steps, warmup, places=places)
    frozen = places < in_steps(freeze_last_layer_epochs, 'freeze_last_layer_epochs')
    final = {'lr': min_lr, 'last_layer_lr': min_lr, 'weight_decay': weight_decay[1]}
    momenta = temperatures = np.empty(0)
    if momentum is not None:
        momenta = cosine_schedule(*momentum, steps, places=places)
        final['momentum'] = momentum[1]
    if teacher_temperature is not None:
        cold, warm = teacher_temperature
        warmup = in_steps(warmup_teacher_temperature_epochs, 'warmup_teacher_temperature_epochs')
        temperatures = cosine_schedule(warm, warm, steps, warmup, start=cold, places=places)
        final['teacher_temperature'] = warm
    return Schedules(
        lr=rates,
        last_layer_lr=np.where(frozen, 0, rates),
        weight_decay=cosine_schedule(*weight_decay, steps, places=places),
        momentum=momenta,
        teacher_temperature=temperatures,
        final=final,
        first=first,
    )
