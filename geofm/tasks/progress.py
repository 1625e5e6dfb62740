"""How far a run has come, in samples: what its schedules go by when its steps change."""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

#: Entry of a checkpoint.
KEY = 'progress'


@dataclass(frozen=True, slots=True)
class Course:
    """What the schedules of a run are counted in, whatever its steps are later.

    Attributes:
        steps: Optimiser steps of the whole run, as it was planned.
        samples_per_step: Samples of such a step.
        steps_per_epoch: Such steps of what counts as an epoch in warm-ups.
    """

    steps: int
    samples_per_step: float
    steps_per_epoch: float

    @property
    def samples(self) -> float:
        """Samples of the whole run."""
        return self.steps * self.samples_per_step


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a checkpoint was written.

    Attributes:
        samples: Samples seen, over all ranks, those seen again counted again.
        course: What its schedules were counted in; None if the checkpoint does not say.
        batch: Samples of a batch, over all ranks.
        step: Optimiser steps.
        epoch: Epochs done.
        batches: Batches done of the epoch under way.
    """

    samples: float
    course: Course | None
    batch: int
    step: int
    epoch: int
    batches: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run divides its samples into optimiser steps.

    Attributes:
        batch: Samples of a batch, over all ranks; batches if their size is not known.
        samples_per_step: Samples of a step, on average: the last window of an epoch may be short.
        steps_per_epoch: Steps of an epoch; infinite for data without length.
        max_epochs: Epochs of the run; infinite without a limit.
        max_steps: Steps of the run; infinite without a limit.
    """

    batch: int
    samples_per_step: float
    steps_per_epoch: float
    max_epochs: float
    max_steps: float

    @classmethod
    def of(cls, trainer: Trainer) -> 'Plan':
        """Plan of a trainer whose training data are set up.

        Args:
            trainer: The trainer.

        Returns:
            The plan.
        """
        loader: Any = trainer.train_dataloader
        size = getattr(loader, 'batch_size', None) or 1
        batch = size * trainer.world_size
        accumulated = trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        # Lightning takes a last window of fewer batches for a step, too.
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
        """Steps of this plan that are to be done.

        Args:
            done: Where the run is resumed; None: it starts.

        Returns:
            The number, 0 or more.

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
                'schedules need an end: set max_steps, or max_epochs if the data have a length'
            )
        return int(left)

    def course(self, done: Progress | None, steps_per_epoch: float) -> Course:
        """What the schedules of the run are counted in.

        A run that is resumed keeps its course, in batches of whatever size, as long as its length
        in samples does.

        Args:
            done: Where the run is resumed; None: it starts.
            steps_per_epoch: Steps of this plan that count as an epoch in warm-ups.

        Returns:
            The course.

        Warns:
            UserWarning: If a run that is resumed has become longer or shorter, by more than 1 %
                and more than what a step of another size makes.
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
                f'the run was planned for {planned:g} samples, {done.samples:g} of them are done; '
                f'now for {samples:g}. Its schedules go on as those of a run of that length would '
                'at this sample, so that learning rate and momentum may jump. For unbroken '
                'schedules keep max_epochs and max_steps as they were'
            )
        steps = round(samples / self.samples_per_step)
        return Course(steps, self.samples_per_step, steps_per_epoch)


def read_progress(checkpoint: Mapping[str, Any], plan: Plan) -> Progress | None:
    """Progress of a run that is resumed from a checkpoint.

    Args:
        checkpoint: A checkpoint of Lightning.
        plan: Plan of the run that goes on; taken for that of the run before if the checkpoint
            does not say.

    Returns:
        The progress; None if the checkpoint has no state of a run.

    Raises:
        ValueError: If its entries are not numbers.
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
        raise ValueError(f'checkpoint: its state of the run cannot be read: {error!r}') from error
