"""Checking the units of the first training batches."""

from typing import Any

from lightning.pytorch import LightningDataModule

from geofm.datamodules.narrow import widen
from geofm.transforms import Normalize
from geofm.units import UnitWatch


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
