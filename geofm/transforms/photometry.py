"""Photometric augmentation of normalised crops, by sensor and in physical units.

The kind and range of changes are defined per sensor, see :attr:`geofm.sensors.Sensor.photometry`.
Some augmentations of DINOv2 are designed for photographs and are left out:

- *solarize* inverts bright pixels, which has no physical equivalent for reflectance,
- *grayscale* replaces all bands by their mean, which removes the spectral information, and the mean
  of normalised bands has no unit,
- *hue and saturation* are undefined for thirteen bands, or for VV and VH.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor, nn

from geofm.device import to_device
from geofm.sensors import (
    DEFAULT_SENSORS,
    SENSORS,
    BandError,
    SensorPhotometry,
    band_statistics,
    check_bands,
    check_channels,
    sensor_channels,
)

#: Gain and offset, shape (N, C) each, of the affine change x -> gain * x + offset of each channel.
Affine = tuple[Tensor, Tensor]


class ReflectanceArgs(TypedDict, total=False):
    """Overrides of the photometric augmentation of sensors that measure reflectance."""

    gain: tuple[float, float]
    band_gain: tuple[float, float]
    haze: tuple[float, float]
    probability: float


class PhotometryArgs(ReflectanceArgs, total=False):
    """Overrides, including the range of the standard deviation of the blur in pixels of a crop."""

    blur: tuple[float, float]


class Photometry(nn.Module):
    """Random photometric augmentation of crops, as defined for each sensor.

    All random numbers except the speckle itself are drawn on the CPU, so that the host does not
    have to wait for an accelerator.
    """

    def __init__(self, bands: Sequence[str], reflectance: ReflectanceArgs | None = None) -> None:
        """Initialize a new Photometry instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            reflectance: Overrides for sensors that measure reflectance: the ranges ``gain`` (shared
                by all bands of a crop: illumination, topography), ``band_gain`` (per band:
                calibration, atmosphere) and ``haze`` (the reflectance added to all bands), and the
                ``probability`` of changing a crop.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__()
        self.bands = check_bands(bands)
        by_sensor = {key: _changed(key, reflectance or {}) for key in _drawn(self.bands)}
        self.gain = GainAndOffset(self.bands, by_sensor)
        self.speckle = nn.ModuleList(
            [
                Speckle(self.bands, key, photometry.looks, photometry.speckle_probability)
                for key, photometry in by_sensor.items()
                if photometry.looks is not None
            ]
        )

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics with which the crops were normalised. Defaults to the sensors'.

        Args:
            mean: Mean of each band in the unit of its sensor, shape (C,).
            std: Standard deviation of each band in the unit of its sensor, shape (C,).

        Raises:
            BandError: If there is not one number per band.
        """
        for module in self.modules():
            if isinstance(module, _Physical):
                module.set_statistics(mean, std)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation with which the crops were normalised."""
        return self.gain.mean, self.gain.std

    def forward(self, crops: Tensor) -> Tensor:
        """Augment crops in place.

        Args:
            crops: Normalised crops, shape (N, C, H, W).

        Returns:
            The same tensor.

        Raises:
            BandError: If the crops do not have one channel per band.
        """
        check_channels(crops, self.bands)
        # A single pass over the pixels for the gains of all sensors.
        change = to_device(torch.stack(self.gain(len(crops))), crops.device)
        gain, offset = change[..., None, None].to(crops.dtype)
        torch.addcmul(offset, crops, gain, out=crops)
        for speckle in self.speckle:
            crops = speckle(crops)
        return crops


def _drawn(bands: Sequence[str]) -> list[str]:
    """Return the sensors in the order in which random numbers are drawn: those with gains first.

    With bands of only Sentinel-1 or Sentinel-2, numbers are drawn for both, so that a seed gives
    the same changes as with the bands of both.
    """
    present = set(sensor_channels(bands))
    if present <= set(DEFAULT_SENSORS):
        present = set(DEFAULT_SENSORS)
    keys = [key for key in SENSORS if key in present]
    return sorted(keys, key=lambda key: SENSORS[key].photometry.gain is None)


def _changed(key: str, changes: ReflectanceArgs) -> SensorPhotometry:
    """Return the augmentation of a sensor, with the overrides of the user."""
    sensor = SENSORS[key]
    if sensor.quantity != 'reflectance' or not changes:
        return sensor.photometry
    return replace(
        sensor.photometry,
        gain=changes.get('gain', sensor.photometry.gain),
        band_gain=changes.get('band_gain', sensor.photometry.band_gain),
        offset=changes.get('haze', sensor.photometry.offset),
        probability=changes.get('probability', sensor.photometry.probability),
    )


class _Physical(nn.Module):
    """Base class for changes of normalised values by amounts in the units of the sensors.

    Args:
        bands: Names of the channels of the crops, in their order.
    """

    def __init__(self, bands: Sequence[str]) -> None:
        super().__init__()
        self.bands = check_bands(bands)
        # Not buffers, since they are used on the CPU, where random numbers are drawn.
        self.mean, self.std = band_statistics(self.bands)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of each band in the units of the sensors."""
        for name, values in (('mean', mean), ('std', std)):
            if values.shape != self.mean.shape:
                raise BandError(
                    f'{name} has shape {tuple(values.shape)}, but there are {len(self.bands)} '
                    f'bands {list(self.bands)}: give one number per band'
                )
        self.mean, self.std = mean.cpu(), std.cpu()


class GainAndOffset(_Physical):
    """Random gains and offsets of the crops of each sensor.

    A value v in physical units becomes ``gain * v + offset``. Gain and offset have a part that is
    shared by all bands of a sensor, and a part per band. For reflectance, gains model illumination,
    topography and calibration, and the offset models path radiance, such as thin haze. For
    backscatter in dB, offsets are gains of power, which model incidence angle, soil moisture and
    calibration.
    """

    def __init__(self, bands: Sequence[str], sensors: Mapping[str, SensorPhotometry]) -> None:
        """Initialize a new GainAndOffset instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            sensors: Augmentation of each sensor by key, in the order in which random numbers are
                drawn.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__(bands)
        self.sensors = {key: change for key, change in sensors.items() if change.is_affine}
        self.channels = sensor_channels(self.bands)

    def forward(self, n_crops: int) -> Affine:
        """Draw gains and offsets.

        Args:
            n_crops: Number of crops N.

        Returns:
            Gain and offset of normalised values, shape (N, C) each, on the CPU; 1 and 0 for
            channels of sensors without gain and offset, and for crops that are not changed.
        """
        shape = (n_crops, len(self.bands))
        gain, offset = torch.ones(shape), torch.zeros(shape)
        for key, photometry in self.sensors.items():
            sensor_gain, sensor_offset = self._draw(key, photometry, shape)
            of_sensor = torch.zeros(len(self.bands), dtype=torch.bool)
            of_sensor[self.channels.get(key, [])] = True
            kept = of_sensor & (torch.rand(n_crops, 1) < photometry.probability)
            gain = torch.where(kept, sensor_gain, gain)
            offset = torch.where(kept, sensor_offset, offset)
        return gain, offset

    def _draw(self, key: str, photometry: SensorPhotometry, shape: tuple[int, int]) -> Affine:
        """Draw gains and offsets for all channels as if they all were of one sensor."""
        shared = (shape[0], 1)
        gain, offset = torch.ones(shape), torch.zeros(shape)
        if photometry.gain is not None:
            gain = _uniform(shared, photometry.gain)
        if photometry.band_gain is not None:
            gain = gain * _uniform(shape, photometry.band_gain)
        if photometry.offset is not None:
            offset = _uniform(shared, photometry.offset)
        if photometry.band_offset is not None:
            offset = offset + _uniform(shape, photometry.band_offset)
        # From physical units to those of the sensor, then to normalised values.
        sensor = SENSORS[key]
        offset = (offset + (gain - 1) * sensor.offset) * (1 / sensor.scale)
        return gain.expand(shape), (((gain - 1) * self.mean + offset) / self.std).expand(shape)


class Speckle(_Physical):
    """Random speckle in the channels of a sensor that measures backscatter.

    Speckle of L looks multiplies the power of each pixel by a Gamma(L) / L variate, with mean 1 and
    variance 1 / L (Goodman, JOSA 1976; Oliver and Quegan, *Understanding Synthetic Aperture Radar
    Images*, 2004). In dB, 10 lg of the variate is added. A pixel of Sentinel-1 IW GRD has about 4.4
    looks. Therefore additional speckle of 4 looks approximately doubles its variance, while 32
    looks are hardly visible.
    """

    def __init__(
        self,
        bands: Sequence[str],
        sensor: str,
        looks: tuple[float, float] = (4.0, 32.0),
        probability: float = 0.5,
    ) -> None:
        """Initialize a new Speckle instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            sensor: Key of the sensor.
            looks: Range of the number of looks, drawn for each crop; at least 4.
            probability: Probability of changing a crop.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If the number of looks may be below 4.
        """
        super().__init__(bands)
        if looks[0] < 4:
            raise ValueError(f'looks must be at least 4, got {looks}')
        self.channels = sensor_channels(self.bands).get(sensor, [])
        self._in_decibel = SENSORS[sensor].unit == 'dB'
        self.looks = looks
        self.probability = probability

    def forward(self, crops: Tensor) -> Tensor:
        """Add speckle in place.

        Args:
            crops: Normalised crops, shape (N, C, H, W).

        Returns:
            The same tensor.
        """
        chosen = (torch.rand(len(crops)) < self.probability).nonzero().squeeze(1)
        looks = to_device(_uniform((len(chosen), 1, 1, 1), self.looks), crops.device)
        chosen = to_device(chosen, crops.device)
        for channel in self.channels:
            noise = speckle_decibel(looks.expand(-1, 1, *crops.shape[-2:])).squeeze(1)
            if self._in_decibel:
                change = noise / self.std[channel]
            else:
                power = crops[chosen, channel] + self.mean[channel] / self.std[channel]
                change = power * (10 ** (noise / 10) - 1)
            crops[:, channel].index_add_(0, chosen, change.to(crops.dtype))
        return crops


def speckle_decibel(looks: Tensor) -> Tensor:
    """Draw speckle in dB: 10 lg of a Gamma(L) / L variate.

    This uses the approximation of Wilson and Hilferty (PNAS 1931) that the cube root of a gamma
    variate is normally distributed. For 4 or more looks, mean and standard deviation are accurate
    to 0.02 dB. It is several times faster than sampling exactly.

    Args:
        looks: Number of looks L of each pixel, at least 4, any shape.

    Returns:
        Noise in dB, same shape and device.
    """
    root = 1 - 1 / (9 * looks) + torch.randn_like(looks) / (3 * looks.sqrt())
    return 30 * root.clamp(min=1e-2).log10()


def blur_sigma(probability: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Draw the strength of the blur of each crop.

    Args:
        probability: Probability of blurring each crop, shape (N,), on the CPU.
        sigma: Range of the standard deviation of the Gaussian, in pixels.

    Returns:
        Standard deviation for each crop, shape (N,); 0 for crops that are not blurred.
    """
    n_crops = len(probability)
    return torch.where(torch.rand(n_crops) < probability, _uniform((n_crops,), sigma), 0.0)


def _uniform(shape: tuple[int, ...], limits: tuple[float, float]) -> Tensor:
    """Draw uniform random numbers on the CPU."""
    return torch.empty(shape).uniform_(*limits)
