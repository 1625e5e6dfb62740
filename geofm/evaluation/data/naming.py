"""A data module's samples with their bands named, and what its own normalisation would do."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchgeo.datamodules import BaseDataModule, GeoDataModule, NonGeoDataModule
from torchgeo.datasets.utils import Sample

from geofm.datasets import NamedBands
from geofm.evaluation.data.sources import SOURCES, ChannelNames, Source
from geofm.sensors import CHANNELS, BandError

#: Samples by which a normalisation is judged.
_JUDGED = 16


class KnownChannels(Dataset[Sample]):
    """The channels of a data set that have a name; the others are left out."""

    def __init__(self, dataset: Dataset[Any], channels: Mapping[str, ChannelNames]) -> None:
        """Initialize a new KnownChannels instance.

        Args:
            dataset: A map-style data set.
            channels: Names of the channels of each image by its key; None for those to leave out.
        """
        self.dataset = dataset
        self.channels = dict(channels)

    def __len__(self) -> int:
        """Number of samples."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample, its images with the named channels alone.

        Raises:
            BandError: If an image has another number of channels than names.
        """
        sample = dict(self.dataset[index])
        for key, names in self.channels.items():
            if len(sample[key]) != len(names):
                raise BandError(
                    f"'{key}' of {type(self.dataset).__name__} has {len(sample[key])} channels, "
                    f'expected are {len(names)}: {list(names)}'
                )
            sample[key] = sample[key][[i for i, name in enumerate(names) if name is not None]]
        return sample


class Windows(Dataset[Sample]):
    """The windows that a sampler of TorchGeo draws, once and for all, as a map-style data set."""

    def __init__(self, dataset: Dataset[Any], sampler: Any, seed: int) -> None:
        """Initialize a new Windows instance.

        Args:
            dataset: A GeoDataset.
            sampler: Its sampler, or batch sampler.
            seed: Seed of what it draws.
        """
        self.dataset = dataset
        if isinstance(getattr(sampler, 'generator', None), np.random.Generator):
            sampler.generator = np.random.default_rng(seed)
        # Older samplers draw from PyTorch's own.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn = list(sampler)
        self.windows = [
            w for batch in drawn for w in (batch if isinstance(batch, list) else [batch])
        ]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        """Read a window."""
        return self.dataset[self.windows[index]]


def innermost(dataset: Any) -> Any:
    """The data set inside subsets and wrappers.

    Args:
        dataset: A data set.

    Returns:
        The one that reads.
    """
    while isinstance(dataset, Subset | Windows | NamedBands | KnownChannels):
        dataset = dataset.dataset
    return dataset


def source_of(dataset: Dataset[Any]) -> Source | None:
    """What is known of a data set.

    Args:
        dataset: A data set, or a subset of one.

    Returns:
        What it yields; None if it is not known.
    """
    for cls in type(innermost(dataset)).__mro__:
        if cls.__name__ in SOURCES:
            return SOURCES[cls.__name__]
    return None


def is_named(dataset: Any) -> bool:
    """Whether the images of a data set have bands by this project's names, in its units.

    Args:
        dataset: A data set, or a subset of one.

    Returns:
        True for the data sets of this project.
    """
    while isinstance(dataset, Subset | Windows):
        dataset = dataset.dataset
    return type(dataset).__module__.startswith('geofm.') and hasattr(dataset, 'bands')


def named(dataset: Dataset[Any], title: str) -> Dataset[Any]:
    """A data set with its bands named.

    Args:
        dataset: A data set.
        title: What a message calls it.

    Returns:
        One whose samples have an 'image' in dB and DN, and that has ``bands``.

    Raises:
        BandError: If the names of the channels are not known.
    """
    inside = innermost(dataset)
    if is_named(dataset):
        return dataset
    source = source_of(dataset)
    if source is None:
        raise BandError(
            f'{title}: the names of the channels of {type(inside).__name__} are not known. Wrap it '
            'in geofm.datamodules.NamedBandsDataModule and name them with source_bands'
        )
    channels = source.channels(inside)
    names = {key: [n for n in image if n is not None] for key, image in channels.items()}
    if not any(names.values()):
        raise BandError(
            f'{title}: {type(inside).__name__} has no band that is known: {list(CHANNELS)}'
        )
    unnamed = any(None in image for image in channels.values())
    reading = KnownChannels(dataset, channels) if unnamed else dataset
    scale = source.scale
    if isinstance(scale, Mapping):
        have = {band for image in names.values() for band in image}
        scale = {band: factor for band, factor in scale.items() if band in have}
    return NamedBands(reading, names, scale=scale, s1_unit=source.s1_unit)


def title_of(datamodule: BaseDataModule) -> str:
    """What a message calls a data module: TorchGeo's general ones by the data set that they read.

    Args:
        datamodule: The data module.

    Returns:
        Name of its class, or of its data set's.
    """
    general = type(datamodule) in (NonGeoDataModule, GeoDataModule)
    return (datamodule.dataset_class if general else type(datamodule)).__name__


def normalisation_line(datamodule: BaseDataModule, dataset: Dataset[Any]) -> str:
    """Say what a data module's own normalisation would do, which is not used.

    Args:
        datamodule: The data module.
        dataset: Its training data, as they come.

    Returns:
        One line of text.
    """
    title = title_of(datamodule)
    replaced = "not used; each backbone's own is"
    mean, std = (torch.as_tensor(v, dtype=torch.float32) for v in (datamodule.mean, datamodule.std))
    if 'image' not in dataset[0]:
        return f'{title}: what it does to its several images is {replaced}'
    if any(v.numel() not in (1, _channels(dataset)) for v in (mean, std)):
        return f'{title}: its normalisation is {replaced}'
    spread = _spread(dataset, mean, std)
    if spread is None:
        return f'{title}: its normalisation is {replaced}'
    if (std < 0).any():
        wrong = 'turns bands upside down (a negative standard deviation)'
    elif spread[0] < 0.01 or spread[1] > 100:
        wrong = f'leaves bands at standard deviations from {spread[0]:.2g} to {spread[1]:.2g}'
    elif mean.eq(0).all() and std.eq(255).all():
        wrong = 'has mean 0 and std 255, which are of pictures of 8 bits'
    else:
        return f'{title}: its normalisation, by its own mean and std, is {replaced}'
    return f'{title}: its normalisation {wrong}: {replaced}'


def _channels(dataset: Dataset[Any]) -> int:
    return int(dataset[0]['image'].shape[-3])


def _spread(dataset: Dataset[Any], mean: Tensor, std: Tensor) -> tuple[float, float] | None:
    """Smallest and largest standard deviation of a band after a normalisation."""
    assert isinstance(dataset, Sized)
    places = torch.linspace(0, len(dataset) - 1, min(_JUDGED, len(dataset))).long().unique()
    pixels = torch.cat(
        [dataset[i]['image'].float().movedim(-3, 0).flatten(1) for i in places.tolist()], dim=1
    )
    spread = ((pixels - mean.view(-1, 1)) / std.view(-1, 1)).nan_to_num().std(dim=1)
    # A band that is constant in all of them says nothing.
    spread = spread[pixels.nan_to_num().std(dim=1) > 0]
    return (spread.min().item(), spread.max().item()) if len(spread) else None
