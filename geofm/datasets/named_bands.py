"""Wrap any data set of images to select its bands by name."""

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchgeo.datasets.utils import Sample

from geofm.datasets.files import files_of
from geofm.printing import warn
from geofm.sensors import (
    SENSORS,
    BandError,
    Sensor,
    band_indices,
    canonical_bands,
    check_bands,
    sensor_channels,
)
from geofm.units import UnitWarning, warn_of_unit

#: Bands of each image of a sample, by its key.
type BandNames = Sequence[str] | Mapping[str, Sequence[str]]

#: Unit of backscatter.
S1Unit = Literal['dB', 'power']


class NamedBands(Dataset[Sample]):
    """Data set with named bands, in the band order and units of geofm.

    Data sets differ in the order of their bands: TorchGeo's EuroSAT has B8A last, and its
    BigEarthNet has VH before VV and no B10. Given the names of the bands, this class selects
    channels by name.

    Values are converted to the units of the sensors, which the normalisation expects: dB for
    Sentinel-1, and DN = reflectance x 10,000 for Sentinel-2. The statistics of Sentinel-2 in
    :mod:`geofm.sensors` are those of Level-1C with clouds. Level-2A (surface reflectance) is darker
    in the blue and brighter in the near infrared: name its bands 's2l2a.B02' and so on, or pass its
    statistics to the data module. Products since January 2022 (processing baseline 04.00) have an
    offset of 1,000 unless the data set removes it.
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
            source_bands: Names of the channels of 'image' in the data set; or a mapping from the
                key of each image of a sample to the names of its channels.
            bands: Names of the bands to return, in this order. Default: all of *source_bands* in
                canonical order.
            scale: Factor that converts values to the unit of the sensor, for all bands or by name,
                e.g. 10,000 for reflectance.
            s1_unit: Unit of Sentinel-1, or of another sensor in dB, in the data set. 'power'
                (linear) is converted to dB, and power that is not positive is invalid. If the
                values look like the other unit, a warning is issued once.
            n_dates: Number of dates k that are concatenated along the channels of 'image', as in
                TorchGeo's SSL4EO-S12 with ``seasons=k``. 'image' becomes (k, C, H, W).

        Raises:
            BandError: If a band is unknown or given twice, or a requested band is missing.
            ValueError: If *s1_unit* is unknown, or the data set has no length.
        """
        if not isinstance(dataset, Sized):
            raise ValueError(f'{type(dataset).__name__} has no length: it must be map-style')
        if s1_unit not in ('dB', 'power'):
            raise ValueError(f"s1_unit must be 'dB' or 'power', not '{s1_unit}'")
        by_key = source_bands if isinstance(source_bands, Mapping) else {'image': source_bands}
        self.dataset = dataset
        self.source_bands = {key: tuple(names) for key, names in by_key.items()}
        available = check_bands([name for names in self.source_bands.values() for name in names])
        self.bands = wanted_bands(bands, available)
        self.s1_unit = s1_unit
        self.n_dates = n_dates
        self._checked = False
        self._pick = band_indices(self.bands, available)
        self._channels = sensor_channels(available)
        self._scale = _factors(scale, available)

    def __len__(self) -> int:
        """Return the number of samples."""
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample in the wrapped data set.

        Returns:
            The sample with

            * image: float32 (C, H, W), or (k, C, H, W) with k dates, in the units of the sensors
              (S1 in dB, S2 in DN), with the channels :attr:`bands`
            * valid: bool (H, W), or (k, H, W). True where all bands of the source are finite,
              within the limits of their sensor and not a nodata value, and where the bands of a
              sensor that measures reflectance are not all 0, as in gaps

            and the other entries of the data set, except images that became part of 'image'. If
            *index* is an integer, it is returned as 'index', int64 ().

        Raises:
            BandError: If an image is missing, or its number of channels differs from that of the
                names.
        """
        sample = dict(self.dataset[index])
        if isinstance(index, SupportsIndex):
            sample['index'] = torch.tensor(index.__index__())
        image = torch.cat([self._take(sample, key) for key in self.source_bands], dim=-3)
        valid = self._measured(image)
        if self._scale is not None:
            image = image * self._scale
        self._check_units(image)
        for key, channels in self._channels.items():
            if SENSORS[key].unit == 'dB' and self.s1_unit == 'power':
                # The logarithm of values <= 0 is not finite, so that these become invalid below.
                image[..., channels, :, :] = 10 * image[..., channels, :, :].log10()
            # Comparisons with NaN are false.
            low, high = SENSORS[key].limits
            part = image[..., channels, :, :]
            valid &= ((part >= low) & (part <= high)).all(dim=-3)
        return {**sample, 'image': image[..., self._pick, :, :], 'valid': valid}

    def files_of(self, index: int) -> list[Path]:
        """Return the files that a sample is read from.

        Args:
            index: Index of the sample.

        Returns:
            The files; an empty list if the wrapped data set does not list them, see
            :func:`geofm.datasets.files_of`.
        """
        return files_of(self.dataset, index)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Draw a sample of the wrapped data set with its own plot method.

        Args:
            *args: Arguments of that method.
            **kwargs: Keyword arguments of that method.

        Returns:
            The figure.
        """
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return dataset.plot(*args, **kwargs)

    def _take(self, sample: dict[str, Any], key: str) -> Tensor:
        """Remove an image from a sample, and return it as float32 (C, H, W) or (k, C, H, W)."""
        names = self.source_bands[key]
        if key not in sample:
            raise BandError(f"no '{key}' in a sample of {self._title}, which has {sorted(sample)}")
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

    def _measured(self, image: Tensor) -> Tensor:
        """Return where an image has no fill values, bool (..., H, W)."""
        valid = torch.ones_like(image[..., 0, :, :], dtype=torch.bool)
        for key, channels in self._channels.items():
            sensor = SENSORS[key]
            part = image[..., channels, :, :]
            # For sensors in dB, 0 is an ordinary value. For sensors that cannot measure 0, it is
            # beyond the limits.
            if sensor.fills_zero and sensor.measures_zero:
                valid &= (part != 0).any(dim=-3)
            for value in sensor.nodata:
                valid &= (part != value).all(dim=-3)
        return valid

    def _check_units(self, image: Tensor) -> None:
        """Warn once if the first image with data is not in the stated unit of backscatter."""
        if self._checked:
            return
        for key, channels in self._channels.items():
            if SENSORS[key].unit == 'dB':
                values = image[..., channels, :, :].movedim(-3, 0).flatten(1)
                values = values[:, ((values != 0) & values.isfinite()).all(dim=0)]
                if values.numel():
                    self._checked = True
                    self._check_backscatter(values, SENSORS[key])

    def _check_backscatter(self, values: Tensor, sensor: Sensor) -> None:
        """Warn if values of a sensor in dB are not in the stated unit."""
        if self.s1_unit == 'power':
            if values.max() < 0:
                warn(
                    f'{self._title}: values of {sensor.short_title} from {values.min():g} to '
                    f"{values.max():g} look like dB, not power: remove s1_unit='power'",
                    UnitWarning,
                )
        else:
            title = f"{self._title}, read with s1_unit='dB' ('power' converts linear power)"
            warn_of_unit(values.numpy(), sensor, title)

    @property
    def _title(self) -> str:
        return type(self.dataset).__name__


def wanted_bands(bands: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """Select the requested bands among the available ones.

    Args:
        bands: Names of the requested bands; None for all.
        available: Names of the available bands.

    Returns:
        The requested bands in the given order, or all available bands in canonical order.

    Raises:
        BandError: If a band is unknown or given twice, or a requested band is missing.
    """
    if bands is None:
        return canonical_bands(available)
    wanted = check_bands(bands)
    missing = [band for band in wanted if band not in available]
    if missing:
        raise BandError(
            f'missing bands {missing}: the data have {list(available)}. To omit them, pass only '
            f'the other bands, also to the model (bands and in_channels)'
        )
    return wanted


def _factors(scale: float | Mapping[str, float], bands: Sequence[str]) -> Tensor | None:
    """Return the factor of each channel, (C, 1, 1), or None if all are 1."""
    if isinstance(scale, Mapping):
        unknown = [band for band in scale if band not in bands]
        if unknown:
            raise BandError(f'scale has unknown bands {unknown}: the data have {list(bands)}')
        factors = [float(scale.get(band, 1.0)) for band in bands]
    else:
        factors = [float(scale)] * len(bands)
    if not all(factor > 0 for factor in factors):
        raise ValueError(f'scale must be positive, got {scale}')
    if all(factor == 1 for factor in factors):
        return None
    return torch.tensor(factors, dtype=torch.float32).view(-1, 1, 1)
