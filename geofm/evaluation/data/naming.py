"""Naming the bands of a data module's samples, and describing its own normalisation."""

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchgeo.datamodules import BaseDataModule, GeoDataModule, NonGeoDataModule
from torchgeo.datasets.utils import Sample

from geofm.datasets import NamedBands, S1Unit
from geofm.sensors import BANDS, CHANNELS, RGB_BANDS, SENTINEL1, SENTINEL2, BandError
from geofm.transforms import PICTURE_WHITE

#: Names of channels in order. None is a channel that is not a known band.
type ChannelNames = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Channels of a data set.

    Attributes:
        channels: Function that returns the names of a data set's channels, by key of the image.
        scale: Factor that converts values to DN (reflectance x 10,000), for all bands or by band.
        s1_unit: Unit of Sentinel-1, dB or linear power.
        note: Note for the report.
    """

    channels: Callable[[Any], Mapping[str, ChannelNames]]
    scale: float | Mapping[str, float] = 1.0
    s1_unit: S1Unit = 'dB'
    note: str = ''


def _own_names(dataset: Any) -> dict[str, ChannelNames]:
    """Return the data set's own ``bands``, with None for unknown bands."""
    return {'image': tuple(band if band in BANDS else None for band in dataset.bands)}


# Files are read in alphabetical order, so VH comes before VV. Level-2A has no B10.
_BEN_S1: ChannelNames = ('VH', 'VV')
_BEN_S2: ChannelNames = tuple(b for b in SENTINEL2.band_names if b != 'B10')
#: TorchGeo's keys of sensors equal those of geofm.
_BEN: dict[str, ChannelNames] = {
    SENTINEL1.name: _BEN_S1,
    SENTINEL2.name: _BEN_S2,
    'all': _BEN_S1 + _BEN_S2,
}


def _bigearthnet(dataset: Any) -> dict[str, ChannelNames]:
    return {'image': _BEN[dataset.bands]}


def _bigearthnet_v2(dataset: Any) -> dict[str, ChannelNames]:
    if dataset.bands == 'all':
        return {'image_s1': _BEN_S1, 'image_s2': _BEN_S2}
    return {'image': _BEN[dataset.bands]}


# Zhu et al., 2020: channels 5 and 6 of Sentinel-1 are the Lee-filtered intensities of VH and VV.
# The others are real and imaginary parts, and the covariance of both.
_SO2SAT = {'S1_B5': 'VH', 'S1_B6': 'VV'}


def _so2sat(dataset: Any) -> dict[str, ChannelNames]:
    # Sentinel-1 comes before Sentinel-2, each in the order of its file.
    names = [*dataset.s1_band_names, *dataset.s2_band_names]
    return {'image': tuple(_SO2SAT.get(n, n[3:] if n.startswith('S2_') else None) for n in names)}


_TREESATAI: dict[str, ChannelNames] = {
    SENTINEL1.name: ('VV', 'VH', None),
    SENTINEL2.name: (
        'B02',
        'B03',
        'B04',
        'B08',
        'B05',
        'B06',
        'B07',
        'B8A',
        'B11',
        'B12',
        'B01',
        'B09',
    ),
}


def _treesatai(dataset: Any) -> dict[str, ChannelNames]:
    return {f'image_{s}': _TREESATAI[s] for s in dataset.sensors if s in _TREESATAI}


def _picture(dataset: Any) -> dict[str, ChannelNames]:
    return {'image': RGB_BANDS}


_PICTURE = Source(
    _picture,
    scale=PICTURE_WHITE / 255,
    note='8-bit red, green and blue are treated as B04, B03 and B02, and white as reflectance 0.3',
)

#: Channels of TorchGeo's data sets, by class name: their names in order, and their units. The
#: entries were checked against TorchGeo 0.10.1 by reading each data set. The channels of other data
#: sets are named by wrapping them in :class:`geofm.datamodules.NamedBandsDataModule`.
SOURCES: dict[str, Source] = {
    'BigEarthNet': Source(_bigearthnet, note='Sentinel-1 is read in whole decibels'),
    'BigEarthNetV2': Source(_bigearthnet_v2),
    'CopernicusBenchBigEarthNetS1': Source(_own_names),
    'CopernicusBenchBigEarthNetS2': Source(_own_names),
    'CopernicusBenchCloudS2': Source(_own_names),
    'CopernicusBenchDFC2020S1': Source(_own_names),
    'CopernicusBenchDFC2020S2': Source(_own_names),
    'CopernicusBenchEuroSATS1': Source(_own_names),
    'CopernicusBenchEuroSATS2': Source(_own_names),
    'CopernicusBenchLCZS2': Source(_own_names, scale=10_000.0),
    'EuroSAT': Source(_own_names),
    'EuroSAT100': Source(_own_names),
    'EuroSATSpatial': Source(_own_names),
    'RESISC45': _PICTURE,
    'SEN12MS': Source(_own_names),
    'So2Sat': Source(
        _so2sat,
        scale=dict.fromkeys(SENTINEL2.band_names, 10_000.0),
        s1_unit='power',
        note='the Lee-filtered intensities of Sentinel-1 are used',
    ),
    'TreeSatAI': Source(_treesatai),
    'UCMerced': _PICTURE,
}


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
        Its entry in :data:`~geofm.evaluation.data.naming.SOURCES`; None if there is none.
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
