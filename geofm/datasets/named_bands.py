"""Any data set of images, its bands by name."""

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

#: What pixels of backscatter are.
S1Unit = Literal['dB', 'power']


class NamedBands(Dataset[Sample]):
    """A data set whose bands are named, brought to the order and units of this project.

    Data sets differ in the order of their bands: TorchGeo's EuroSAT has B8A last, its BigEarthNet
    has VH before VV and no B10. With the names given once, the channels that are wanted are
    picked by name.

    Values are brought to the units of their sensors, for which the normalisation is made: dB
    (Sentinel-1), DN = reflectance x 10,000 (Sentinel-2). The statistics of Sentinel-2 in
    :mod:`geofm.sensors` are those of Level-1C with clouds. Level-2A, the reflectance at the
    surface, is darker in the blue and brighter in the near infrared: name its bands 's2l2a.B02'
    and so on, or give its statistics to the data module. Products since January 2022 (processing
    baseline 04.00) have 1,000 added unless the data set takes it off.
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
            s1_unit: Whether Sentinel-1, or another sensor whose unit is dB, comes in dB or as
                linear power, which becomes dB; power that is not positive is invalid. A warning is
                given once if the values look like the other.
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

            * image: float32 (C, H, W), or (k, C, H, W) with k dates, in the units of the sensors
              (S1 in dB, S2 in DN), channels as in :attr:`bands`
            * valid: bool (H, W), or (k, H, W), True where all bands of the source are finite and
              within the limits of their sensor, none has a nodata value of its sensor, and those of
              a sensor that measures reflectance are not all 0, which is how gaps are filled

            and what else the data set yields, but for the images that became part of 'image'. A
            sample that is asked for by number has that as 'index', int64 ().

        Raises:
            BandError: If an image is missing or has another number of channels than names.
        """
        sample = dict(self.dataset[index])
        if isinstance(index, SupportsIndex):
            sample['index'] = torch.tensor(index.__index__())
        image = torch.cat([self._take(sample, key) for key in self.source_bands], dim=-3)
        valid = self._measured(image)
        if self._scale is not None:
            image = image * self._scale
        self._judge_units(image)
        for key, channels in self._channels.items():
            if SENSORS[key].unit == 'dB' and self.s1_unit == 'power':
                # Where the logarithm is not finite there was no echo to measure.
                image[..., channels, :, :] = 10 * image[..., channels, :, :].log10()
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

    def _measured(self, image: Tensor) -> Tensor:
        """Where the numbers of an image are no fill, bool (..., H, W)."""
        valid = torch.ones_like(image[..., 0, :, :], dtype=torch.bool)
        for key, channels in self._channels.items():
            sensor = SENSORS[key]
            part = image[..., channels, :, :]
            # 0 dB is a value like any other; 0 of a sensor that has none is beyond its limits.
            if sensor.fills_zero and sensor.measures_zero:
                valid &= (part != 0).any(dim=-3)
            for value in sensor.nodata:
                valid &= (part != value).all(dim=-3)
        return valid

    def _judge_units(self, image: Tensor) -> None:
        """Warn once if backscatter of the first image with data is not in the stated unit."""
        if self._judged:
            return
        for key, channels in self._channels.items():
            if SENSORS[key].unit == 'dB':
                values = image[..., channels, :, :].movedim(-3, 0).flatten(1)
                values = values[:, ((values != 0) & values.isfinite()).all(dim=0)]
                if values.numel():
                    self._judged = True
                    self._judge_backscatter(values, SENSORS[key])

    def _judge_backscatter(self, values: Tensor, sensor: Sensor) -> None:
        """Warn if values of a sensor in dB are not in the stated unit."""
        if self.s1_unit == 'power':
            if values.max() < 0:
                warn(
                    f'{self._title}: values of {sensor.short_title} from {values.min():g} to '
                    f"{values.max():g} look like dB, not power: leave out s1_unit='power'",
                    UnitWarning,
                )
        else:
            title = f"{self._title}, read with s1_unit='dB' ('power' converts linear power)"
            warn_of_unit(values.numpy(), sensor, title)

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
        return canonical_bands(available)
    wanted = check_bands(bands)
    missing = [band for band in wanted if band not in available]
    if missing:
        raise BandError(
            f'missing bands {missing}: the data have {list(available)}. To go without them, name '
            f'the other bands only, to the model too (bands and in_channels)'
        )
    return wanted


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
