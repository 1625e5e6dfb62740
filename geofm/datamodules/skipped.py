"""Reporting the files that could not be read, once per epoch."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class SkippedFiles(Callback):
    """Callback that reports the files that could not be read, at the end of each epoch.

    With ``on_error='skip'``, other files are read in their place. The report counts the files that
    the workers of all ranks have skipped since the last report, and names the first one.
    :class:`~geofm.datamodules.resumable.ResumableDataModule` adds this callback.
    """

    def __init__(self) -> None:
        """Initialize a new SkippedFiles instance."""
        # Number of failures reported so far, by data set.
        self._seen: dict[int, int] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report files that were skipped in training.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'train')

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report files that were skipped in validation.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'val')

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report files that were skipped in testing.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'test')

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report files that were skipped in prediction.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._report(trainer, 'predict')

    def _report(self, trainer: Trainer, split: str) -> None:
        """Warn if any rank has skipped files."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        pairs: Any = innermost(getattr(datamodule, f'{split}_dataset', None))
        if getattr(pairs, 'on_error', None) != 'skip':
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
    """Unwrap a data set.

    Args:
        dataset: A data set, or a wrapper of one with the attribute ``dataset``.

    Returns:
        The data set inside all wrappers.
    """
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset


def _gathered(count: int, first: str | None) -> list[tuple[int, str | None]]:
    """Return the count and the first file of each rank."""
    mine = (count, first)
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return of_all
