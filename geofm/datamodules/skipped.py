"""What could not be read, told once an epoch."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset


class SkippedFiles(Callback):
    """Reports, at the end of each epoch, the files that could not be read.

    With ``on_error='skip'`` others were read in their place. The report counts what the workers of
    all processes skipped since the last one, and names the first file. The data module
    brings this callback itself.
    """

    def __init__(self, dataset_of: Callable[[str], Dataset[Any] | None]) -> None:
        """Initialize a new SkippedFiles instance.

        Args:
            dataset_of: Gives the data set of 'train', 'val', 'test' or 'predict'.
        """
        self._dataset_of = dataset_of
        self._seen: dict[int, int] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what training skipped.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'train')

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what validation skipped.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'val')

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what testing skipped.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'test')

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what prediction skipped.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'predict')

    def _report(self, trainer: Trainer, split: str) -> None:
        """Warn of files, if any process has skipped some."""
        pairs: Any = innermost(self._dataset_of(split))
        if not hasattr(pairs, 'failed'):
            return
        new = pairs.failed(self._seen.get(id(pairs), 0))
        self._seen[id(pairs)] = self._seen.get(id(pairs), 0) + len(new)
        of_all = _gathered(len(new), new[0] if new else None)
        count = sum(number for number, _ in of_all)
        if count:
            first = next(path for _, path in of_all if path is not None)
            rank_zero_warn(
                f'{split}, epoch {trainer.current_epoch}: {count} times a file could not be read '
                f'and another was read in its place (first: {first})'
            )


def innermost(dataset: Any) -> Any:
    """Find what is read in the end.

    Args:
        dataset: A data set, or windows, dates or a subset of one.

    Returns:
        The data set.
    """
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset


def _gathered(count: int, first: str | None) -> list[tuple[int, str | None]]:
    """What each process has to say, for all of them."""
    mine = (count, first)
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return of_all
