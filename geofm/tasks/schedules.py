"""DINOv2's schedules: one table from step to value."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geofm.printing import warn

FloatArray = npt.NDArray[np.float64]


def cosine_schedule(
    base: float,
    final: float,
    steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
    places: FloatArray | None = None,
) -> FloatArray:
    """Linear warm-up, then half a cosine.

    Args:
        base: Value at the end of the warm-up.
        final: Value that the cosine tends to.
        steps: Length of the schedule, warm-up included.
        warmup_steps: Length of the warm-up.
        start: First value of the warm-up.
        places: Where to take the values, in steps, not below 0, of shape (N,); these may lie
            between two steps. All steps by default.

    Returns:
        One value a place, of shape (N,). Place i after the warm-up holds
        ``final + (base - final) * (1 + cos(pi * i / n)) / 2`` where n is the steps after it.
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
    """What changes from step to step. Each array has one value an optimiser step.

    Attributes:
        lr: Learning rate.
        last_layer_lr: Learning rate of the heads' last layers: 0 while they are frozen.
        weight_decay: Weight decay.
        momentum: Momentum of the teacher; empty if there is none.
        teacher_temperature: Temperature of the teacher's softmax; empty if there is none.
        final: What each tends to, by name: its value beyond the end.
        first: Optimiser step of the first value: where a run is resumed.
    """

    lr: FloatArray
    last_layer_lr: FloatArray
    weight_decay: FloatArray
    momentum: FloatArray
    teacher_temperature: FloatArray
    final: Mapping[str, float]
    first: int = 0

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.lr)

    def at(self, step: int) -> dict[str, float]:
        """Values of a step; beyond the end, the final ones.

        Args:
            step: Optimiser step, from 0.

        Returns:
            Value by name.
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
    """Schedules of DINOv2 (Oquab et al., 2023).

    Args:
        steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of an epoch.
        lr: Peak learning rate.
        min_lr: Final learning rate.
        warmup_epochs: Warm-up of the learning rate, from 0.
        weight_decay: First and final weight decay, along a cosine.
        freeze_last_layer_epochs: How long the heads' last layers stay as they are.
        momentum: First and final momentum of the teacher, along a cosine; None: no teacher.
        teacher_temperature: First and final temperature, along a line; None: no temperature.
        warmup_teacher_temperature_epochs: Length of that line.
        places: Where to take the values, see :func:`cosine_schedule`.
        first: Optimiser step of the first place.

    Returns:
        The table.

    Warns:
        UserWarning: If a warm-up is as long as the run, or longer and had to be cut.
    """

    def in_steps(epochs: float, name: str) -> int:
        wanted = round(epochs * steps_per_epoch)
        if wanted > steps:
            warn(
                f'{name}={epochs:g} are {wanted} steps, but the run has {steps}: cut to these. '
                'Take fewer epochs for it, or say with samples_per_epoch how long one is'
            )
        elif wanted == steps > 0:
            warn(
                f'{name}={epochs:g} are {wanted} steps, which is the whole run. Take fewer epochs '
                'for it, or say with samples_per_epoch how long one is'
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
