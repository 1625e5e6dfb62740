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
class Progress:
    """Where a checkpoint was written.

    Attributes:
        samples: Samples seen, over all ranks, those seen again counted again.
        planned: Samples of the whole run, as it was planned then.
        batch: Samples of a batch, over all ranks.
        step: Optimiser steps.
        epoch: Epochs done.
        batches: Batches done of the epoch under way.
    """

    samples: float
    planned: float
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

    def steps_from(self, done: Progress | None) -> tuple[int, int]:
        """Steps of the whole run, and how many of them are done.

        Args:
            done: Where the run is resumed; None: it starts.

        Returns:
            Both in steps of this plan: what was seen before, in steps of another size, counts by
            its samples.

        Raises:
            ValueError: If the run has no end.
        """
        if done is None:
            position, left = 0, min(self.max_steps, self.max_epochs * self.steps_per_epoch)
        else:
            position = round(done.samples / self.samples_per_step)
            of_epoch = math.floor(done.batches * done.batch / self.samples_per_step + 1e-6)
            epochs = (self.max_epochs - done.epoch) * self.steps_per_epoch - of_epoch
            left = max(0, min(self.max_steps - done.step, epochs))
        if math.isinf(left):
            raise ValueError(
                'schedules need an end: set max_steps, or max_epochs if the data have a length'
            )
        return position + int(left), position


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
        return Progress(
            float(known.get('samples', step * plan.samples_per_step)),
            float(known.get('planned', math.nan)),
            int(known.get('batch', plan.batch)),
            step,
            int(epoch['processed']),
            0 if epoch['started'] == epoch['processed'] else int(batches),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'checkpoint: its state of the run cannot be read: {error!r}') from error


def warn_of_length(done: Progress, samples: float) -> None:
    """Warn if a run that is resumed is longer or shorter than it was planned.

    Args:
        done: Where it is resumed.
        samples: Samples of the whole run, as it is planned now.

    Warns:
        UserWarning: If the lengths differ by more than 1 %.
    """
    if abs(samples - done.planned) > 0.01 * done.planned:
        rank_zero_warn(
            f'the run was planned for {done.planned:g} samples, {done.samples:g} of them are done; '
            f'now for {samples:g}. Its schedules go on as those of a run of that length would '
            'at this sample, so that learning rate and momentum may jump. For unbroken schedules '
            'keep max_epochs and max_steps as they were'
        )
