"""Any data set of Sentinel images, its bands by name."""

import warnings
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchgeo.datasets.utils import Sample

from geofm.datasets.files import files_of
from geofm.sensors import BANDS, SENSORS, BandError, band_indices, check_bands, sensor_channels
from geofm.units import UnitWarning, warn_of_unit

#: Bands of each image of a sample, by its key.
type BandNames = Sequence[str] | Mapping[str, Sequence[str]]

#: What Sentinel-1 pixels are.
S1Unit = Literal['dB', 'power']


class NamedBands(Dataset[Sample]):
    """A data set whose bands are named, brought to the order and units of this project.

    Data sets differ in the order of their bands: TorchGeo's EuroSAT has B8A last, its BigEarthNet
    has VH before VV and no B10. With the names given once, the channels that are wanted are
    picked by name.

    Values are brought to dB (Sentinel-1) and DN = reflectance x 10,000 (Sentinel-2), for which
    the normalisation is made. The statistics of :mod:`geofm.sensors` are those of Level-1C with
    clouds. Level-2A, the reflectance at the surface, is darker in the blue and brighter in the near
    infrared, and products since January 2022 (processing baseline 04.00) have 1,000 added unless
    the data set takes it off: give the statistics of such data to the data module.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        source_bands: BandNames,
        bands: Sequence[str] | None = None,
        scale: float | Mapping[str, float] = 1.0,
        s1_unit: S1Unit = 'dB',
        n_dates: int | None = None,
    ) -> None:
        """Initialize a new NamedBands instance.

        Args:
            dataset: A map-style data set whose samples have an 'image' (C, H, W).
            source_bands: Names of the channels of 'image', in the order in which the data set
                yields them; or, for each of several images under keys of their own, its names.
            bands: Names of the bands to return, in the order to return them; by default all of
                *source_bands* in canonical order.
            scale: Factor that brings values to the unit of the sensor, for all bands or by name:
                10,000 for reflectances.
            s1_unit: Whether Sentinel-1 comes in dB or as linear power, which becomes dB; power that
                is not positive is invalid. A warning is given once if the values look like the
                other.
            n_dates: Number of dates k that lie one after the other in the channels of 'image', as
                in TorchGeo's SSL4EO-S12 with ``seasons=k``. 'image' becomes (k, C, H, W).

        Raises:
            BandError: If a band is unknown or given twice, or a wanted band is missing.
            ValueError: If *s1_unit* is unknown, or the data set has no length.
        """
        if not isinstance(dataset, Sized):
            raise ValueError(f'{type(dataset).__name__} has no length; a map-style one is needed')
        if s1_unit not in ('dB', 'power'):
            raise ValueError(f"s1_unit must be 'dB' or 'power', not '{s1_unit}'")
        by_key = source_bands if isinstance(source_bands, Mapping) else {'image': source_bands}
        self.dataset = dataset
        self.source_bands = {key: tuple(names) for key, names in by_key.items()}
        available = check_bands([name for names in self.source_bands.values() for name in names])
        self.bands = wanted_bands(bands, available)
        self.s1_unit = s1_unit
        self.n_dates = n_dates
        self._judged = False
        self._pick = band_indices(self.bands, available)
        self._channels = sensor_channels(available)
        self._scale = _factors(scale, available)

    def __len__(self) -> int:
        """Number of samples."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample in the data set that is wrapped.

        Returns:
            The sample with

            * image: float32 (C, H, W), or (k, C, H, W) with k dates, S1 in dB and S2 in DN,
              channels as in :attr:`bands`
            * valid: bool (H, W), or (k, H, W), True where all bands of the source are finite and
              within the limits of their sensor, and those of S2 not all 0, which is how gaps are
              filled

            and what else the data set yields, but for the images that became part of 'image'. A
            sample that is asked for by number has that as 'index', int64 ().

        Raises:
            BandError: If an image is missing or has another number of channels than names.
        """
        sample = dict(self.dataset[index])
        if isinstance(index, SupportsIndex):
            sample['index'] = torch.tensor(index.__index__())
        image = torch.cat([self._take(sample, key) for key in self.source_bands], dim=-3)
        if self._scale is not None:
            image = image * self._scale
        valid = torch.ones_like(image[..., 0, :, :], dtype=torch.bool)
        if 's2' in self._channels:
            valid &= (image[..., self._channels['s2'], :, :] != 0).any(dim=-3)
        self._judge_unit(image)
        if 's1' in self._channels and self.s1_unit == 'power':
            channels = self._channels['s1']
            # Where the logarithm is not finite there was no echo to measure.
            image[..., channels, :, :] = 10 * image[..., channels, :, :].log10()
        for key, channels in self._channels.items():
            # Comparisons with NaN are false.
            low, high = SENSORS[key].limits
            part = image[..., channels, :, :]
            valid &= ((part >= low) & (part <= high)).all(dim=-3)
        return {**sample, 'image': image[..., self._pick, :, :], 'valid': valid}

    def files_of(self, index: int) -> list[Path]:
        """Files behind a sample.

        Args:
            index: Number of the sample.

        Returns:
            The files, if the data set that is wrapped tells, see
            :func:`geofm.datasets.files.files_of`; none otherwise.
        """
        return files_of(self.dataset, index)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw a sample as the data set does; it must be one of its own.

        Args:
            *args: Arguments passed to the data set.
            **kwargs: Keyword arguments passed to the data set.

        Returns:
            The figure.
        """
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return dataset.plot(*args, **kwargs)

    def _take(self, sample: dict[str, Any], key: str) -> Tensor:
        """An image of a sample as float32 (C, H, W) or (k, C, H, W)."""
        names = self.source_bands[key]
        if key not in sample:
            raise BandError(f"no '{key}' in a sample of {self._title}: it has {sorted(sample)}")
        image = sample.pop(key)
        expected = len(names) * (self.n_dates or 1)
        if image.ndim != 3 or len(image) != expected:
            raise BandError(
                f"'{key}' of {self._title} has shape {tuple(image.shape)}, but source_bands names "
                f'{expected} channels: {list(names)}'
                + (f' for each of {self.n_dates} dates' if self.n_dates else '')
            )
        image = image.to(torch.float32)
        return image if self.n_dates is None else image.unflatten(0, (self.n_dates, -1))

    def _judge_unit(self, image: Tensor) -> None:
        """Warn once if Sentinel-1 of the first image with data is not in the unit that was said."""
        if self._judged or 's1' not in self._channels:
            return
        values = image[..., self._channels['s1'], :, :].movedim(-3, 0).flatten(1)
        values = values[:, ((values != 0) & values.isfinite()).all(dim=0)]
        if not values.numel():
            return
        self._judged = True
        if self.s1_unit == 'power':
            if values.max() < 0:
                warnings.warn(
                    f'{self._title}: values of Sentinel-1 from {values.min():g} to '
                    f"{values.max():g} look like dB, not power: leave out s1_unit='power'",
                    UnitWarning,
                    stacklevel=3,
                )
        else:
            title = f"{self._title}, read with s1_unit='dB' ('power' converts linear power)"
            warn_of_unit(values.numpy(), SENSORS['s1'], title)

    @property
    def _title(self) -> str:
        return type(self.dataset).__name__


def wanted_bands(bands: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """Bands to return of those there are.

    Args:
        bands: Names of the bands wanted; None wants all.
        available: Names of the bands there are.

    Returns:
        The bands wanted, in the order given, or all, in canonical order.

    Raises:
        BandError: If a band is unknown or given twice, or a wanted band is missing.
    """
    if bands is None:
        return tuple(band for band in BANDS if band in available)
    missing = [band for band in check_bands(bands) if band not in available]
    if missing:
        raise BandError(
            f'missing bands {missing}: the data have {list(available)}. To go without them, name '
            f'the other bands only, to the model too (bands and in_channels)'
        )
    return tuple(bands)


def _factors(scale: float | Mapping[str, float], bands: Sequence[str]) -> Tensor | None:
    """Factor of each channel (C, 1, 1), or None if all are 1."""
    if isinstance(scale, Mapping):
        unknown = [band for band in scale if band not in bands]
        if unknown:
            raise BandError(f'scale of bands {unknown}, but the data have {list(bands)}')
        factors = [float(scale.get(band, 1.0)) for band in bands]
    else:
        factors = [float(scale)] * len(bands)
    if not all(factor > 0 for factor in factors):
        raise ValueError(f'scale must be positive, got {scale}')
    if all(factor == 1 for factor in factors):
        return None
    return torch.tensor(factors, dtype=torch.float32).view(-1, 1, 1)
