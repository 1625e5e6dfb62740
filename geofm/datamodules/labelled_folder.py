"""Data module of images in one folder per class, like EuroSAT and many other data sets."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import Subset
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoClassificationDataset
from torchgeo.datasets.utils import Path

from geofm.datamodules.hooks import PlacesStay
from geofm.printing import warn
from geofm.rasters import RASTER_ERRORS, open_raster
from geofm.sensor_rasters import MOST_VALUES
from geofm.sensors import BandError


def read_image(path: str) -> npt.NDArray[np.float32]:
    """Read all bands of an image.

    Args:
        path: A file in a format that rasterio reads.

    Returns:
        Values of shape (H, W, C).

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with open_raster(path) as src:
            if src.count * src.height * src.width > MOST_VALUES:
                raise ValueError(f'{src.height} x {src.width} pixels are too many for an image')
            return np.moveaxis(src.read().astype(np.float32), 0, -1)
    except RASTER_ERRORS as error:
        raise ValueError(f'{path}: cannot be read: {error}') from error


class _Unnamed(nn.Module):
    """Normalisation that raises an error, since the bands have no names."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        raise BandError(
            'LabelledFolderDataModule reads bands without names, which cannot be normalised: wrap '
            'it in geofm.datamodules.NamedBandsDataModule and name them with source_bands'
        )


class LabelledFolderDataModule(PlacesStay, NonGeoDataModule):
    """Images in one folder per class, split at random within each class.

    Neighbouring images may be in different splits. If the places of the images are known, split
    them by place instead, with one data set per split.

    The bands have no names. To train on the images, name their bands with
    :class:`geofm.datamodules.NamedBandsDataModule`, which also normalises them. To pretrain on all
    images, set both fractions to 0.
    """

    def __init__(
        self,
        root: Path,
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Initialize a new LabelledFolderDataModule instance.

        Args:
            root: Folder with one subfolder per class.
            val_fraction: Fraction of each class for validation. By default 0.2, with a warning that
                these images are not used for training. With 0 there is no validation split.
            test_fraction: Fraction of each class for testing, likewise.
            batch_size: Number of images in a batch.
            num_workers: Number of worker processes that read samples.
            seed: Seed of the split.

        Raises:
            ValueError: If the fractions leave no images for training.
        """
        self._fractions_given = val_fraction is not None and test_fraction is not None
        val_fraction = 0.2 if val_fraction is None else val_fraction
        test_fraction = 0.2 if test_fraction is None else test_fraction
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f'val_fraction {val_fraction} and test_fraction {test_fraction} leave no image to '
                'train on'
            )
        super().__init__(
            NonGeoClassificationDataset, batch_size, num_workers, root=root, loader=read_image
        )
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        # In place of TorchGeo's default, which divides by 255.
        self.aug = _Unnamed()

    def setup(self, stage: str) -> None:
        """Make the data sets. The split does not depend on the stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            ValueError: If there is no folder with images.
        """
        try:
            dataset: Any = self.dataset_class(**self.kwargs)
        except OSError as error:
            raise ValueError(
                f'{self.kwargs["root"]}: must contain a folder of images for each class: {error}'
            ) from error
        targets = torch.tensor(dataset.targets)
        generator = torch.Generator().manual_seed(self.seed)
        parts: dict[str, list[int]] = {'train': [], 'val': [], 'test': []}
        for label in targets.unique():
            members = torch.nonzero(targets == label).flatten()
            shuffled = members[torch.randperm(len(members), generator=generator)].tolist()
            test = round(self.test_fraction * len(shuffled))
            val = round(self.val_fraction * len(shuffled))
            parts['test'] += shuffled[:test]
            parts['val'] += shuffled[test : test + val]
            parts['train'] += shuffled[test + val :]
        for split, indices in parts.items():
            subset = Subset(dataset, sorted(indices)) if indices else None
            setattr(self, f'{split}_dataset', subset)
        self._warn_of_held_out(len(targets), len(parts['train']))

    def _warn_of_held_out(self, every: int, trained: int) -> None:
        """Warn once of held-out images, unless the user has set the fractions."""
        if self._fractions_given or trained == every:
            return
        self._fractions_given = True
        warn(
            f'{self.kwargs["root"]}: {every - trained} of {every} images are held out for '
            f'validation and testing: set val_fraction (default: {self.val_fraction:g}) and '
            f'test_fraction (default: {self.test_fraction:g}), or set both to 0 to train on all'
        )
