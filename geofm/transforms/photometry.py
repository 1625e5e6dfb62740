"""Photometry of normalised crops, sensor by sensor, in physical units.

What suits a camera's pictures does not suit measurements. Left out of DINOv2's list on purpose:

- *solarize* inverts the bright part of a picture; nothing on the ground or in the air does that to
  reflectance,
- *grayscale* replaces every band by a mean of the bands; that throws away the spectrum, which is
  what a multispectral sensor is there for, and a mean of normalised bands has no unit,
- *hue and saturation* have no meaning for thirteen bands, still less for VV and VH.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from geofm.sensors import BandError, band_statistics, check_bands, check_channels, sensor_channels

#: Digital number of Sentinel-2 Level-1C at a reflectance of 1.
DN_PER_REFLECTANCE = 10_000.0

#: Affine change of each channel of each crop, x -> gain * x + offset, both of shape (N, C).
Affine = tuple[Tensor, Tensor]


class ReflectanceArgs(TypedDict, total=False):
    """Arguments of :class:`ReflectanceGain`, for those who want Sentinel-2 changed more or less."""

    gain: tuple[float, float]
    band_gain: tuple[float, float]
    haze: tuple[float, float]
    probability: float


class PhotometryArgs(ReflectanceArgs, total=False):
    """The same, and the range of the blur's standard deviation, in pixels of a crop."""

    blur: tuple[float, float]


class Photometry(nn.Module):
    """Random photometry of crops, each sensor by its own rules.

    All random numbers but the speckle itself are drawn on the CPU, so that the host never waits
    for an accelerator to learn which crops to change.
    """

    def __init__(self, bands: Sequence[str], reflectance: ReflectanceArgs | None = None) -> None:
        """Initialize a new Photometry instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            reflectance: Arguments of :class:`ReflectanceGain` that differ from its defaults.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__()
        self.gains = nn.ModuleList(
            [ReflectanceGain(bands, **(reflectance or {})), BackscatterGain(bands)]
        )
        self.speckle = Speckle(bands)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set what the crops were normalised with; at first, the statistics of SEN12MS-CR-TS.

        Args:
            mean: Mean of each band in raw units, shape (C,).
            std: Standard deviation of each band in raw units, shape (C,).

        Raises:
            BandError: If they do not hold one number a band.
        """
        for module in self.modules():
            if isinstance(module, _Physical):
                module.set_statistics(mean, std)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each band that the crops were normalised with."""
        return self.speckle.mean, self.speckle.std

    def forward(self, crops: Tensor) -> Tensor:
        """Change crops in place.

        Args:
            crops: Normalised crops, shape (N, C, H, W).

        Returns:
            The same tensor.

        Raises:
            BandError: If the crops do not have one channel a band.
        """
        check_channels(crops, self.speckle.bands)
        # One pass over the pixels for all gains: they touch different channels.
        gain, offset = torch.ones(crops.shape[:2]), torch.zeros(crops.shape[:2])
        for module in self.gains:
            sensor_gain, sensor_offset = module(len(crops))
            gain *= sensor_gain
            offset += sensor_offset
        gain = gain[..., None, None].to(crops, non_blocking=True)
        offset = offset[..., None, None].to(crops, non_blocking=True)
        torch.addcmul(offset, crops, gain, out=crops)
        return self.speckle(crops)


class _Physical(nn.Module):
    """What changes normalised values by an amount in raw units.

    Args:
        bands: Names of the channels of the crops, in their order.
    """

    def __init__(self, bands: Sequence[str]) -> None:
        super().__init__()
        self.bands = check_bands(bands)
        # No buffers: they are used where the random numbers are drawn, on the CPU.
        self.mean, self.std = band_statistics(self.bands)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation of each band, in raw units."""
        for name, values in (('mean', mean), ('std', std)):
            if values.shape != self.mean.shape:
                raise BandError(
                    f'{name} has shape {tuple(values.shape)}, but there are {len(self.bands)} '
                    f'bands {list(self.bands)}: give one number a band'
                )
        self.mean, self.std = mean.cpu(), std.cpu()


class ReflectanceGain(_Physical):
    """Draws brightness, contrast and haze of Sentinel-2 crops.

    Reflectance r becomes ``g_b * r + h``: g_b is a gain that all bands share (illumination,
    topography), times a small one of each band (calibration, atmosphere); h is path radiance, as
    of thin haze, the same in all bands.
    """

    def __init__(
        self,
        bands: Sequence[str],
        gain: tuple[float, float] = (0.8, 1.2),
        band_gain: tuple[float, float] = (0.95, 1.05),
        haze: tuple[float, float] = (0.0, 0.03),
        probability: float = 0.8,
    ) -> None:
        """Initialize a new ReflectanceGain instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            gain: Range of the gain that all bands of a crop share.
            band_gain: Range of the gain of each band.
            haze: Range of the reflectance added to all bands.
            probability: Probability of changing a crop.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__(bands)
        self.gain, self.band_gain, self.haze = gain, band_gain, haze
        self.probability = probability

    def forward(self, n_crops: int) -> Affine:
        """Draw gains and offsets.

        Args:
            n_crops: Number of crops N.

        Returns:
            Gain and offset of normalised values, shape (N, C) each, on the CPU; 1 and 0 for the
            channels of other sensors and the crops that stay as they are.
        """
        shape = (n_crops, len(self.bands))
        gain = _uniform((n_crops, 1), self.gain) * _uniform(shape, self.band_gain)
        haze = _uniform((n_crops, 1), self.haze) * DN_PER_REFLECTANCE
        offset = ((gain - 1) * self.mean + haze) / self.std
        return _only('s2', self.bands, self.probability, gain, offset)


class BackscatterGain(_Physical):
    """Draws the calibration gain of Sentinel-1 crops, in dB.

    A gain of backscattered power is an offset in dB. VV and VH share most of it (incidence angle,
    soil moisture); each has a small one of its own, so that their ratio varies a little.
    """

    def __init__(
        self,
        bands: Sequence[str],
        gain: tuple[float, float] = (-1.5, 1.5),
        band_gain: tuple[float, float] = (-0.5, 0.5),
        probability: float = 0.8,
    ) -> None:
        """Initialize a new BackscatterGain instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            gain: Range of the gain that both polarisations share, in dB.
            band_gain: Range of the gain of each polarisation, in dB.
            probability: Probability of changing a crop.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        super().__init__(bands)
        self.gain, self.band_gain = gain, band_gain
        self.probability = probability

    def forward(self, n_crops: int) -> Affine:
        """Draw gains and offsets.

        Args:
            n_crops: Number of crops N.

        Returns:
            Gain (all 1) and offset of normalised values, shape (N, C) each, on the CPU; offset 0
            for the channels of other sensors and the crops that stay as they are.
        """
        shape = (n_crops, len(self.bands))
        decibel = _uniform((n_crops, 1), self.gain) + _uniform(shape, self.band_gain)
        return _only('s1', self.bands, self.probability, torch.ones(shape), decibel / self.std)


class Speckle(_Physical):
    """Adds speckle to Sentinel-1 crops.

    Speckle of L looks multiplies the power of each pixel by a Gamma(L) / L variate, of mean 1 and
    variance 1 / L (Goodman, JOSA 1976; Oliver and Quegan, *Understanding Synthetic Aperture Radar
    Images*, 2004); in dB it adds 10 lg of that. A Sentinel-1 IW GRD pixel has about 4.4 looks, so
    that 4 looks on top about double its speckle, and 32 hardly show.
    """

    def __init__(
        self,
        bands: Sequence[str],
        looks: tuple[float, float] = (4.0, 32.0),
        probability: float = 0.5,
    ) -> None:
        """Initialize a new Speckle instance.

        Args:
            bands: Names of the channels of the crops, in their order.
            looks: Range of the number of looks, drawn for each crop; at least 4.
            probability: Probability of changing a crop.

        Raises:
            BandError: If a band is unknown or given twice.
            ValueError: If *looks* starts below 4.
        """
        super().__init__(bands)
        if looks[0] < 4:
            raise ValueError(f'looks must be at least 4, got {looks}')
        self.channels = sensor_channels(self.bands).get('s1', [])
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
        looks = _uniform((len(chosen), 1, 1, 1), self.looks).to(crops.device, non_blocking=True)
        chosen = chosen.to(crops.device, non_blocking=True)
        for channel in self.channels:
            noise = speckle_decibel(looks.expand(-1, 1, *crops.shape[-2:])).squeeze(1)
            crops[:, channel].index_add_(0, chosen, (noise / self.std[channel]).to(crops.dtype))
        return crops


def speckle_decibel(looks: Tensor) -> Tensor:
    """Draw speckle in dB: 10 lg of a Gamma(L) / L variate.

    Drawn by the approximation of Wilson and Hilferty (PNAS 1931), that the cube root of a gamma
    variate is normal. From 4 looks on, mean and standard deviation are right to 0.02 dB, and it is
    several times faster than an exact draw.

    Args:
        looks: Number of looks L of each pixel, at least 4, any shape.

    Returns:
        Noise in dB, same shape, on the same device.
    """
    root = 1 - 1 / (9 * looks) + torch.randn_like(looks) / (3 * looks.sqrt())
    return 30 * root.clamp(min=1e-2).log10()


def blur_sigma(probability: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Draw which crops to blur, and how much.

    Args:
        probability: Probability of blurring each crop, shape (N,), on the CPU.
        sigma: Range of the standard deviation of the Gaussian, in pixels.

    Returns:
        Standard deviation for each crop, shape (N,), 0 where it is not blurred.
    """
    n_crops = len(probability)
    return torch.where(torch.rand(n_crops) < probability, _uniform((n_crops,), sigma), 0.0)


def _uniform(shape: tuple[int, ...], limits: tuple[float, float]) -> Tensor:
    """Uniform random numbers on the CPU."""
    return torch.empty(shape).uniform_(*limits)


def _only(
    sensor: str, bands: Sequence[str], probability: float, gain: Tensor, offset: Tensor
) -> Affine:
    """Keep an affine change for one sensor's channels and a random share of the crops."""
    of_sensor = torch.zeros(len(bands), dtype=torch.bool)
    of_sensor[sensor_channels(bands).get(sensor, [])] = True
    kept = of_sensor & (torch.rand(len(gain), 1) < probability)
    return torch.where(kept, gain, 1.0), torch.where(kept, offset, 0.0)
