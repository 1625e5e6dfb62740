"""Hooks on batches of data modules: checks of targets and units, and transfer to the device."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from geofm.datamodules.narrow import widen
from geofm.datasets import stays_on_host
from geofm.device import copy_beside
from geofm.transforms import Normalize
from geofm.units import UnitWatch


class PlacesStay(LightningDataModule):
    """Data module that keeps the float64 georeferences of batches on the host.

    .. seealso:: :func:`geofm.datasets.stays_on_host`
    """

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch to the device, except for float64 tensors with georeferences.

        Args:
            batch: A batch.
            device: The device.
            dataloader_idx: Index of the data loader.

        Returns:
            The batch, with the same entries.
        """
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        stay = {key: value for key, value in batch.items() if stays_on_host(key, value)}
        rest = {key: value for key, value in batch.items() if key not in stay}
        move = super().transfer_batch_to_device
        moved = copy_beside(lambda: move(rest, device, dataloader_idx), device)
        return {key: stay.get(key, moved.get(key)) for key in batch}


class WatchedUnits(LightningDataModule):
    """Data module that warns, once per sensor, if values are in another unit than expected.

    It checks the raw values of the first training batches, before normalisation.
    """

    _unit_watch: UnitWatch | None = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check a batch on the CPU.

        Args:
            batch: A batch.
            dataloader_idx: Index of its data loader.

        Returns:
            The batch.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        normalize = getattr(self, 'aug', None)
        if (
            self.trainer is None
            or not self.trainer.training
            or not isinstance(normalize, Normalize)
            or not isinstance(batch, dict)
        ):
            return batch
        if self._unit_watch is None:
            self._unit_watch = UnitWatch(normalize.bands, type(self).__name__)
        if not self._unit_watch.is_done:
            image = batch['image']
            if isinstance(image, list):
                image = widen(image, normalize.bands)
            if image.shape[-3] == len(normalize.bands):
                self._unit_watch.look(image.numpy())
        return batch


class CheckedTargets(LightningDataModule):
    """Data module that raises an error if a label is not a class of the task.

    Otherwise, losses would fail with an unclear message on a CPU, and crash the process on a GPU.
    """

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the targets of a batch on the CPU.

        Args:
            batch: A batch.
            dataloader_idx: Index of its data loader.

        Returns:
            The batch. For multiclass tasks, labels of shape (B, 1) are converted to (B,).

        Raises:
            ValueError: If a label or mask contains a value that is not a class of the task.
        """
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        module = self.trainer.lightning_module if self.trainer else None
        if module is None or not isinstance(batch, dict):
            return batch
        return check_targets(batch, module.hparams)


def check_targets(batch: dict[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """Check the targets of a batch against a task.

    Args:
        batch: Batch with 'label' (B,), (B, 1) or (B, L), or 'mask' (B, H, W), or neither.
        task: Hyperparameters of a TorchGeo task: 'num_classes', 'num_labels', 'ignore_index'.

    Returns:
        The batch. For multiclass tasks, labels of shape (B, 1) are converted to (B,).

    Raises:
        ValueError: If a label or mask contains a value that is not a class of the task.
    """
    classes, labels = task.get('num_classes'), task.get('num_labels')
    label = batch.get('label')
    target = label if isinstance(label, Tensor) and _whole(label) else None
    if target is not None and labels and (target.ndim != 2 or target.shape[1] != labels):
        raise ValueError(
            f'labels of shape {tuple(target.shape)}, but the task has num_labels={labels}: give 0 '
            'or 1 for each label'
        )
    if target is not None and classes and not labels:
        if target.ndim == 2 and target.shape[1] == 1:
            target = target[:, 0]
            batch = {**batch, 'label': target}
        if target.ndim == 2:
            raise ValueError(
                f'labels of shape {tuple(target.shape)}: images have several labels. Set '
                f"task='multilabel' and num_labels={target.shape[1]}"
            )
        _check_range('labels', target, int(classes), None)
    mask = batch.get('mask')
    if isinstance(mask, Tensor) and _whole(mask) and classes and not labels:
        _check_range('masks', mask, int(classes), task.get('ignore_index'))
    return batch


def _whole(target: Tensor) -> bool:
    return not target.is_floating_point() and target.numel() > 0


def _check_range(what: str, target: Tensor, classes: int, ignored: int | None) -> None:
    low, high = (int(value) for value in torch.aminmax(target))
    if low >= 0 and high < classes:
        return
    values = target.unique()
    wrong = values[(values < 0) | (values >= classes)]
    wrong = wrong if ignored is None else wrong[wrong != ignored]
    if not len(wrong):
        return
    advice = f'set num_classes to {high + 1} or more' if low >= 0 else 'number classes from 0'
    if what == 'masks':
        advice += ', or ignore_index if the value means that there is no label'
    raise ValueError(
        f'{what} contain {wrong[:5].tolist()}, but the task has num_classes={classes}'
        + ('' if ignored is None else f' and ignore_index={ignored}')
        + f': {advice}'
    )
