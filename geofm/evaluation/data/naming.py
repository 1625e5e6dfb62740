"""Naming the bands of a data module's samples, and describing its own normalisation."""

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

#: Number of samples from which a normalisation is judged.
_JUDGED = 16


class KnownChannels(Dataset[Sample]):
    """Data set with only the named channels of another."""

    def __init__(self, dataset: Dataset[Any], channels: Mapping[str, ChannelNames]) -> None:
        """Initialize a new KnownChannels instance.

        Args:
            dataset: A map-style data set.
            channels: Names of the channels of each image, by its key. Channels with the name None
                are left out.
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
            The sample, whose images have only the named channels.

        Raises:
            BandError: If the number of channels of an image differs from the number of names.
        """
        sample = dict(self.dataset[index])
        for key, names in self.channels.items():
            if len(sample[key]) != len(names):
                raise BandError(
                    f"'{key}' of {type(self.dataset).__name__} has {len(sample[key])} channels, "
                    f'but {len(names)} are expected: {list(names)}'
                )
            sample[key] = sample[key][[i for i, name in enumerate(names) if name is not None]]
        return sample


class Windows(Dataset[Sample]):
    """Map-style data set of windows, drawn once by a sampler of TorchGeo."""

    def __init__(self, dataset: Dataset[Any], sampler: Any, seed: int) -> None:
        """Initialize a new Windows instance.

        Args:
            dataset: A GeoDataset.
            sampler: Its sampler or batch sampler.
            seed: Seed of the sampler.
        """
        self.dataset = dataset
        if isinstance(getattr(sampler, 'generator', None), np.random.Generator):
            sampler.generator = np.random.default_rng(seed)
        # Samplers without a generator draw from PyTorch's global one.
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


#: Data sets that select samples of another.
SELECTIONS = (Subset, Windows)


def innermost(
    dataset: Any, wrappers: tuple[type[Any], ...] = (*SELECTIONS, NamedBands, KnownChannels)
) -> Any:
    """Return the data set inside subsets and wrappers.

    Args:
        dataset: A data set.
        wrappers: Classes of subsets and wrappers.

    Returns:
        The first data set that is not an instance of *wrappers*.
    """
    while isinstance(dataset, wrappers):
        dataset = dataset.dataset
    return dataset


def source_of(dataset: Dataset[Any]) -> Source | None:
    """Return the known channels of a data set.

    Args:
        dataset: A data set, or a subset of one.

    Returns:
        Its entry in :data:`~geofm.evaluation.data.sources.SOURCES`; None if there is none.
    """
    for cls in type(innermost(dataset)).__mro__:
        if cls.__name__ in SOURCES:
            return SOURCES[cls.__name__]
    return None


def is_named(dataset: Any) -> bool:
    """Return whether a data set already has named bands in the units of geofm.

    Args:
        dataset: A data set, or a subset of one.

    Returns:
        True for data sets of geofm.
    """
    dataset = innermost(dataset, SELECTIONS)
    return type(dataset).__module__.startswith('geofm.') and hasattr(dataset, 'bands')


def named(dataset: Dataset[Any], title: str) -> Dataset[Any]:
    """Name the bands of a data set.

    Args:
        dataset: A data set.
        title: Name of the data set in messages.

    Returns:
        A data set with the attribute ``bands``, whose samples have an 'image' in dB and DN.

    Raises:
        BandError: If the names of the channels are unknown.
    """
    inside = innermost(dataset)
    if is_named(dataset):
        return dataset
    source = source_of(dataset)
    if source is None:
        raise BandError(
            f'{title}: the channels of {type(inside).__name__} are unknown. Wrap it in '
            'geofm.datamodules.NamedBandsDataModule and name them with source_bands'
        )
    channels = source.channels(inside)
    names = {key: [n for n in image if n is not None] for key, image in channels.items()}
    if not any(names.values()):
        raise BandError(
            f'{title}: {type(inside).__name__} has none of the known bands: {list(CHANNELS)}'
        )
    unnamed = any(None in image for image in channels.values())
    reading = KnownChannels(dataset, channels) if unnamed else dataset
    scale = source.scale
    if isinstance(scale, Mapping):
        have = {band for image in names.values() for band in image}
        scale = {band: factor for band, factor in scale.items() if band in have}
    return NamedBands(reading, names, scale=scale, s1_unit=source.s1_unit)


def title_of(datamodule: BaseDataModule) -> str:
    """Return the name of a data module in messages.

    Args:
        datamodule: The data module.

    Returns:
        Name of its class; for TorchGeo's generic data modules, name of the class of its data set.
    """
    general = type(datamodule) in (NonGeoDataModule, GeoDataModule)
    return (datamodule.dataset_class if general else type(datamodule)).__name__


def normalisation_line(datamodule: BaseDataModule, dataset: Dataset[Any]) -> str:
    """Describe the normalisation of a data module, which is not used.

    Args:
        datamodule: The data module.
        dataset: Its training data, not normalised.

    Returns:
        One line of text.
    """
    title = title_of(datamodule)
    replaced = "not used; each backbone's own normalisation is"
    mean, std = (torch.as_tensor(v, dtype=torch.float32) for v in (datamodule.mean, datamodule.std))
    if 'image' not in dataset[0]:
        return f'{title}: its normalisation of several images is {replaced}'
    if any(v.numel() not in (1, _channels(dataset)) for v in (mean, std)):
        return f'{title}: its normalisation is {replaced}'
    spread = _spread(dataset, mean, std)
    if spread is None:
        return f'{title}: its normalisation is {replaced}'
    if (std < 0).any():
        wrong = 'inverts bands (a negative standard deviation)'
    elif spread[0] < 0.01 or spread[1] > 100:
        wrong = f'leaves bands with standard deviations from {spread[0]:.2g} to {spread[1]:.2g}'
    elif mean.eq(0).all() and std.eq(255).all():
        wrong = 'has mean 0 and std 255, as for 8-bit images'
    else:
        return f'{title}: its normalisation, by its own mean and std, is {replaced}'
    return f'{title}: its normalisation {wrong}: {replaced}'


def _channels(dataset: Dataset[Any]) -> int:
    return int(dataset[0]['image'].shape[-3])


def _spread(dataset: Dataset[Any], mean: Tensor, std: Tensor) -> tuple[float, float] | None:
    """Return the smallest and largest standard deviation of a band after a normalisation."""
    assert isinstance(dataset, Sized)
    places = torch.linspace(0, len(dataset) - 1, min(_JUDGED, len(dataset))).long().unique()
    pixels = torch.cat(
        [dataset[i]['image'].float().movedim(-3, 0).flatten(1) for i in places.tolist()], dim=1
    )
    spread = ((pixels - mean.view(-1, 1)) / std.view(-1, 1)).nan_to_num().std(dim=1)
    # Bands that are constant in all of these samples are left out.
    spread = spread[pixels.nan_to_num().std(dim=1) > 0]
    return (spread.min().item(), spread.max().item()) if len(spread) else None
