"""Data module of EuroSAT RGB, split by place."""

from typing import Any

import torch
from torchgeo.datamodules import NonGeoDataModule

from geofm.datamodules.hooks import CheckedTargets, PlacesStay
from geofm.datasets import EuroSATRGB


class EuroSATRGBDataModule(CheckedTargets, PlacesStay, NonGeoDataModule):
    """EuroSAT RGB: images of ten classes, as DN of B04, B03 and B02.

    The splits do not share cells of one degree of latitude and longitude.

    .. seealso:: :class:`geofm.datasets.EuroSATRGB`
    """

    #: Mean and standard deviation of B04, B03, B02 over the training cells of seed 0, in DN.
    mean = torch.tensor([1001.1, 1073.2, 1128.9])
    std = torch.tensor([592.8, 398.1, 334.0])

    def __init__(self, batch_size: int = 64, num_workers: int = 0, **kwargs: Any) -> None:
        """Initialize a new EuroSATRGBDataModule instance.

        Args:
            batch_size: Number of images in a batch.
            num_workers: Number of worker processes that read samples.
            **kwargs: Further arguments of :class:`geofm.datasets.EuroSATRGB`.
        """
        super().__init__(EuroSATRGB, batch_size, num_workers, **kwargs)
