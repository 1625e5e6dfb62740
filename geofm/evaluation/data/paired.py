"""Pairing two data modules of the same places, such as the sensors of Copernicus-Bench."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchgeo.datamodules import BaseDataModule
from torchgeo.datasets.utils import Sample

from geofm.evaluation.data.naming import named, title_of
from geofm.sensors import BandError, check_bands


class Paired(Dataset[Sample]):
    """Paired samples of two data sets, whose images are concatenated.

    The data sets must contain the same places in the same order. Samples with different targets are
    an error.

    Attributes:
        bands: Names of the channels of the first data set, then of the second.
    """

    def __init__(self, first: Any, second: Any, title: str) -> None:
        """Initialize a new Paired instance.

        Args:
            first: A data set with named bands.
            second: Another data set with named bands.
            title: Name of the data sets in messages.

        Raises:
            BandError: If they have a band in common.
            ValueError: If their numbers of samples differ.
        """
        if len(first) != len(second):
            raise ValueError(
                f'{title}: {len(first)} and {len(second)} samples cannot be paired: the numbers '
                'must be equal'
            )
        self.first, self.second, self.title = first, second, title
        try:
            self.bands = check_bands((*first.bands, *second.bands))
        except BandError as error:
            raise BandError(f'{title}: {error}') from error

    def __len__(self) -> int:
        """Number of pairs."""
        assert isinstance(self.first, Sized)
        return len(self.first)

    def __getitem__(self, index: int) -> Sample:
        """Read a pair.

        Args:
            index: Index of the pair.

        Returns:
            The first sample, with the 'image' of both, and 'valid' where both are valid.

        Raises:
            ValueError: If the targets or the sizes of the images differ.
        """
        first, second = self.first[index], self.second[index]
        for key in ('label', 'mask'):
            if key in first and not _same(first[key], second.get(key)):
                raise ValueError(f"{self.title}: '{key}' of sample {index} differs: not a pair")
        if first['image'].shape[-2:] != second['image'].shape[-2:]:
            raise ValueError(
                f'{self.title}: images of sample {index} have sizes '
                f'{tuple(first["image"].shape[-2:])} and {tuple(second["image"].shape[-2:])}'
            )
        # Other entries, such as positions and times, are nearly the same in both samples.
        return {
            **first,
            'image': torch.cat([first['image'], second['image']]),
            'valid': first['valid'] & second['valid'],
        }


def _same(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and bool(torch.equal(first, second))


class PairedDataModule(BaseDataModule):
    """Data module of pairs of two data modules, e.g. S1 and S2 of Copernicus-Bench."""

    def __init__(self, first: BaseDataModule, second: BaseDataModule) -> None:
        """Initialize a new PairedDataModule instance.

        Args:
            first: Data module whose targets and batch size are used.
            second: Data module whose images are added.
        """
        super().__init__(first.dataset_class, first.batch_size, first.num_workers)
        self.first, self.second = first, second

    def prepare_data(self) -> None:
        """Download the data of both, if they are configured to."""
        self.first.prepare_data()
        self.second.prepare_data()

    def setup(self, stage: str) -> None:
        """Set up the data sets of a stage.

        Args:
            stage: Either 'fit', 'validate' or 'test'.

        Raises:
            BandError: If channels are unknown, or if both have a band in common.
            ValueError: If the samples cannot be paired.
        """
        self.first.setup(stage)
        self.second.setup(stage)
        titles = [title_of(m) for m in (self.first, self.second)]
        for split in ('train', 'val', 'test'):
            datasets = [getattr(m, f'{split}_dataset') for m in (self.first, self.second)]
            if None not in datasets:
                first, second = (named(d, t) for d, t in zip(datasets, titles, strict=True))
                setattr(self, f'{split}_dataset', Paired(first, second, ' and '.join(titles)))
