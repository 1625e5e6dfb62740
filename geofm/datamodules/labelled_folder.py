"""Images sorted into a folder for each class, as EuroSAT and many others come."""

from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from torch.utils.data import Subset
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoClassificationDataset
from torchgeo.datasets.utils import Path


def read_image(path: str) -> npt.NDArray[np.float32]:
    """Read all bands of an image.

    Args:
        path: A file that rasterio reads.

    Returns:
        Values of shape (H, W, C).

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with rasterio.open(path) as src:
            return np.moveaxis(src.read().astype(np.float32), 0, -1)
    except rasterio.RasterioIOError as error:
        raise ValueError(f'{path}: cannot be read: {error}') from error


class LabelledFolderDataModule(NonGeoDataModule):
    """Images of a folder that has a folder for each class, split at random within the classes.

    Images that lie side by side may fall into different splits: where places are known, split by
    place, and make a data set for each split. Name the bands with
    :class:`geofm.datamodules.NamedBandsDataModule`.
    """

    def __init__(
        self,
        root: Path,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Initialize a new LabelledFolderDataModule instance.

        Args:
            root: The folder.
            val_fraction: Share of each class to choose by.
            test_fraction: Share of each class to report on.
            batch_size: Number of images in a batch.
            num_workers: Number of processes that read.
            seed: Seed of the split.

        Raises:
            ValueError: If the shares leave nothing to learn from.
        """
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f'val_fraction {val_fraction} and test_fraction {test_fraction} leave no image to '
                'train on'
            )
        super().__init__(
            NonGeoClassificationDataset, batch_size, num_workers, root=root, loader=read_image
        )
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed

    def setup(self, stage: str) -> None:
        """Make the data sets; the split does not depend on the stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            ValueError: If there is no folder with images.
        """
        try:
            dataset: Any = self.dataset_class(**self.kwargs)
        except OSError as error:
            raise ValueError(
                f'{self.kwargs["root"]}: needs a folder of images for each class: {error}'
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
            setattr(self, f'{split}_dataset', Subset(dataset, sorted(indices)))
