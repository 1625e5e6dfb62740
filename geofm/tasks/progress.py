"""Progress of a run in samples, so that schedules continue when the batch size changes."""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

#: Key of the progress in a checkpoint.
KEY = 'progress'


@dataclass(frozen=True, slots=True)
class Course:
    """Length of a run as planned at its start, in the units of its schedules.

    Attributes:
        steps: Planned number of optimiser steps of the whole run.
        samples_per_step: Number of samples per planned step.
        steps_per_epoch: Number of planned steps that count as an epoch in warm-ups.
    """

    steps: int
    samples_per_step: float
    steps_per_epoch: float

    @property
    def samples(self) -> float:
        """Planned number of samples of the whole run."""
        return self.steps * self.samples_per_step


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run when a checkpoint was written.

    Attributes:
        samples: Number of samples seen over all ranks, with repetitions.
        course: Planned length of the run; None if not stored in the checkpoint.
        batch: Number of samples of a batch over all ranks.
        step: Number of optimiser steps done.
        epoch: Number of epochs done.
        batches: Number of batches done in the current epoch.
    """

    samples: float
    course: Course | None
    batch: int
    step: int
    epoch: int
    batches: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Division of a run's samples into optimiser steps.

    Attributes:
        batch: Number of samples of a batch over all ranks. If the batch size is unknown, a batch
            counts as one sample.
        samples_per_step: Mean number of samples per step. The last step of an epoch may have fewer.
        steps_per_epoch: Number of steps per epoch; infinite for data without length.
        max_epochs: Number of epochs of the run; infinite without a limit.
        max_steps: Number of steps of the run; infinite without a limit.
    """

    batch: int
    samples_per_step: float
    steps_per_epoch: float
    max_epochs: float
    max_steps: float

    @classmethod
    def of(cls, trainer: Trainer) -> 'Plan':
        """Derive the plan from a trainer.

        Args:
            trainer: The trainer, with training data set up.

        Returns:
            The plan.
        """
        loader: Any = trainer.train_dataloader
        size = getattr(loader, 'batch_size', None) or 1
        batch = size * trainer.world_size
        accumulated = trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        # With gradient accumulation, Lightning also steps after fewer batches at an epoch's end.
        steps = math.inf if math.isinf(batches) else math.ceil(batches / accumulated)
        samples_per_step: float = batch * accumulated
        if not math.isinf(batches) and steps:
            epoch = batches * batch
            sampler = getattr(loader, 'sampler', None)
            if getattr(loader, 'batch_size', None) is not None and isinstance(sampler, Sized):
                # The last batch may be short.
                epoch = min(epoch, len(sampler) * trainer.world_size)
            samples_per_step = epoch / steps
        epochs = trainer.max_epochs
        return cls(
            batch,
            samples_per_step,
            steps,
            math.inf if epochs in (None, -1) else max(int(epochs or 0), 1),
            math.inf if trainer.max_steps == -1 else trainer.max_steps,
        )

    def steps_left(self, done: Progress | None) -> int:
        """Compute the number of remaining steps.

        Args:
            done: Progress of the resumed run; None for a new run.

        Returns:
            Number of steps, at least 0.

        Raises:
            ValueError: If the run has no end.
        """
        if done is None:
            left = min(self.max_steps, self.max_epochs * self.steps_per_epoch)
        else:
            of_epoch = math.floor(done.batches * done.batch / self.samples_per_step + 1e-6)
            epochs = (self.max_epochs - done.epoch) * self.steps_per_epoch - of_epoch
            left = max(0, min(self.max_steps - done.step, epochs))
        if math.isinf(left):
            raise ValueError(
                'schedules need an end: set max_steps, or max_epochs for data of known length'
            )
        return int(left)

    def course(self, done: Progress | None, steps_per_epoch: float) -> Course:
        """Return the planned length of the run for its schedules.

        A resumed run keeps its plan, also with another batch size, as long as its total number of
        samples stays the same.

        Args:
            done: Progress of the resumed run; None for a new run.
            steps_per_epoch: Number of steps that count as an epoch in warm-ups.

        Returns:
            The planned length.

        Warns:
            UserWarning: If the length of a resumed run has changed by more than 1 % and by more
                than one step and one batch.
        """
        left = self.steps_left(done)
        if done is None:
            return Course(left, self.samples_per_step, steps_per_epoch)
        samples = done.samples + left * self.samples_per_step
        planned = math.nan if done.course is None else done.course.samples
        rounding = self.samples_per_step + done.batch
        if done.course is not None and abs(samples - planned) <= max(0.01 * planned, rounding):
            return done.course
        if done.course is not None:
            rank_zero_warn(
                f'the run was planned for {planned:g} samples, of which {done.samples:g} are done, '
                f'and now has {samples:g}. Its schedules continue as in a run of the new length, '
                'so learning rate and momentum may jump. To avoid this, keep max_epochs and '
                'max_steps unchanged'
            )
        steps = round(samples / self.samples_per_step)
        return Course(steps, self.samples_per_step, steps_per_epoch)


def read_progress(checkpoint: Mapping[str, Any], plan: Plan) -> Progress | None:
    """Read the progress of a run from a checkpoint.

    Args:
        checkpoint: A checkpoint of Lightning.
        plan: Plan of the resumed run. Values that the checkpoint lacks are taken from it.

    Returns:
        The progress; None if the checkpoint has no state of a run.

    Raises:
        ValueError: If the entries of the checkpoint are invalid.
    """
    if 'loops' not in checkpoint:
        return None
    try:
        loop = checkpoint['loops']['fit_loop']
        epoch = loop['epoch_progress']['current']
        batches = loop['epoch_loop.batch_progress']['current']['processed']
        step = int(checkpoint['global_step'])
        known = checkpoint.get(KEY, {})
        course = known.get('course')
        return Progress(
            float(known.get('samples', step * plan.samples_per_step)),
            None if course is None else Course(int(course[0]), float(course[1]), float(course[2])),
            int(known.get('batch', plan.batch)),
            step,
            int(epoch['processed']),
            0 if epoch['started'] == epoch['processed'] else int(batches),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'the checkpoint has an invalid state of the run: {error!r}') from error
