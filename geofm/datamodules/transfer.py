"""Transfer of batches to the device."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from geofm.datasets import stays_on_host
from geofm.device import copy_beside


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
