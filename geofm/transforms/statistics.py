"""Normalise images band by band, with statistics that are stored with weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from geofm.sensors import BandError, band_statistics, check_bands, check_channels, sensor_of


class Normalize(nn.Module):
    """Normalise bands to zero mean and unit standard deviation, and set invalid pixels to zero.

    The input is a sample or a batch on any device. The statistics are moved to the device of the
    image at the first call, since Lightning does not move the modules of a data module.

    Clipping is important for Sentinel-1: scenes contain outliers (ships, layover, thermal noise)
    that are tens of standard deviations from the mean and would dominate a loss. The default of 5
    standard deviations keeps reflectances of Sentinel-2 up to about 1.4 in most bands (B01 to B8A).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        bands: Sequence[str],
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        clip: float | None = 5.0,
    ) -> None:
        """Initialize a new Normalize instance.

        Args:
            bands: Names of the channels, in the order of the image.
            mean: Mean of each band in the unit of its sensor, shape (C,). By default, the mean
                defined by the sensor, see :mod:`geofm.sensors`.
            std: Standard deviation of each band in the unit of its sensor, shape (C,). By default,
                the standard deviation defined by the sensor.
            clip: Maximum magnitude of normalised values, in standard deviations; None for no
                limit.

        Raises:
            BandError: If a band is unknown or given twice, or *mean* or *std* do not have one
                number per band.
            ValueError: If a standard deviation or *clip* is not positive.
        """
        super().__init__()
        self.bands = check_bands(bands)
        self.clip = clip
        default_mean, default_std = band_statistics(self.bands)
        mean = default_mean if mean is None else torch.as_tensor(mean, dtype=torch.float32)
        std = default_std if std is None else torch.as_tensor(std, dtype=torch.float32)
        for name, values in (('mean', mean), ('std', std)):
            if values.shape != (len(self.bands),):
                raise BandError(
                    f'{name} has shape {tuple(values.shape)}, but there are {len(self.bands)} '
                    f'bands {list(self.bands)}: give one number per band'
                )
        if not (std > 0).all():
            raise ValueError(f'standard deviations must be positive, got {std.tolist()}')
        if clip is not None and clip <= 0:
            raise ValueError(f'clip must be positive or None, got {clip}')
        # Not persistent, since they are given by the arguments.
        self.register_buffer('mean', mean.view(-1, 1, 1), persistent=False)
        self.register_buffer('std', std.view(-1, 1, 1), persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Normalise the image of a sample or batch.

        Pixels with NaN or infinity in any band are invalid, whatever 'valid' is.

        Args:
            batch: Dictionary with 'image' (..., C, H, W) in the units of the sensors and
                optionally 'valid' bool (..., H, W). Other entries are unchanged.

        Returns:
            New dictionary with the normalised 'image', which is 0 (the mean) for invalid pixels,
            and the updated 'valid' bool (..., H, W).

        Raises:
            BandError: If the image does not have one channel per band.
        """
        image: Tensor = batch['image']
        mean, std = self._statistics(image)
        # A sum over the bands is only finite if each value is; cheaper than testing all values.
        valid = image.sum(dim=-3, dtype=torch.float32).isfinite()
        if 'valid' in batch:
            valid &= batch['valid']
        # In place after the first operation, since memory access dominates on a CPU.
        normalised = (image - mean).div_(std)
        if self.clip is not None:
            normalised.clamp_(-self.clip, self.clip)
        # Not multiplied by the mask, since NaN * 0 is NaN.
        normalised.masked_fill_(~valid.unsqueeze(-3), 0.0)
        return {**batch, 'image': normalised, 'valid': valid}

    def denormalize(self, image: Tensor) -> Tensor:
        """Convert a normalised image back to the units of its sensors. Clipping is not undone.

        Args:
            image: Normalised image, shape (..., C, H, W).

        Returns:
            The image in the units of the sensors, same shape.

        Raises:
            BandError: If the image does not have one channel per band.
        """
        mean, std = self._statistics(image)
        return image * std + mean

    def _statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (C, 1, 1) on the device of the image."""
        check_channels(image, self.bands)
        if self.mean.device != image.device:
            # Lightning validates in inference mode, whose tensors cannot be used in training.
            with torch.inference_mode(False):
                self.to(image.device)
        return self.mean, self.std

    def extra_repr(self) -> str:
        """Return the arguments, for the string representation of the module."""
        return f'bands={list(self.bands)}, clip={self.clip}'


@dataclass(frozen=True)
class InputStatistics:
    """Statistics with which the input of a model was normalised, by band name.

    Attributes:
        mean: Mean of each band in the unit of its sensor.
        std: Standard deviation of each band in the unit of its sensor.
        clip: Maximum magnitude of normalised values, in standard deviations; None for no limit.
    """

    mean: Mapping[str, float]
    std: Mapping[str, float]
    clip: float | None = 5.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            BandError: If a band is unknown, or does not have both a mean and a standard deviation.
            ValueError: If a number is not finite, or a standard deviation or *clip* is not
                positive.
        """
        if self.mean:
            check_bands(list(self.mean))
        if set(self.mean) != set(self.std):
            raise BandError(f'mean of {sorted(self.mean)}, but std of {sorted(self.std)}')
        finite = all(math.isfinite(value) for value in (*self.mean.values(), *self.std.values()))
        if not finite or not all(value > 0 for value in self.std.values()):
            raise ValueError('means must be finite and standard deviations positive')
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f'clip must be positive or None, not {self.clip}')

    @classmethod
    def of(cls, normalize: Normalize) -> Self:
        """Return the statistics of a normalisation.

        Args:
            normalize: The normalisation.

        Returns:
            Its statistics.
        """
        mean, std = normalize.mean.flatten().tolist(), normalize.std.flatten().tolist()
        return cls(
            dict(zip(normalize.bands, mean, strict=True)),
            dict(zip(normalize.bands, std, strict=True)),
            normalize.clip,
        )

    @classmethod
    def from_entry(cls, entry: Any) -> Self:
        """Make statistics from the result of :meth:`entry`.

        Args:
            entry: Entry of a file; not trusted.

        Returns:
            The statistics.

        Raises:
            ValueError: If the entry is invalid, or a band has another unit than in this version.
        """
        if not isinstance(entry, Mapping) or not isinstance(entry.get('bands'), Mapping):
            raise ValueError("no mapping 'bands'")
        bands, clip = entry['bands'], entry.get('clip')
        for band, values in bands.items():
            if not isinstance(band, str) or not isinstance(values, Mapping):
                raise ValueError("'bands' does not map names to mean, std and unit")
            if not all(_is_number(values.get(key)) for key in ('mean', 'std')):
                raise ValueError(f'{band}: mean and std must be numbers')
            if values.get('unit') != sensor_of(band).unit:
                raise ValueError(
                    f'{band}: trained in {values.get("unit")!r}, but this version of geofm uses '
                    f'{sensor_of(band).unit!r}'
                )
        if clip is not None and not _is_number(clip):
            raise ValueError('clip must be a number or null')
        mean, std = (
            {band: float(values[key]) for band, values in bands.items()} for key in ('mean', 'std')
        )
        return cls(mean, std, None if clip is None else float(clip))

    def entry(self) -> dict[str, Any]:
        """Convert the statistics to plain JSON data.

        Returns:
            ``bands``, with mean, standard deviation and unit of each band by name, and ``clip``.
        """
        return {
            'bands': {
                band: {'mean': mean, 'std': self.std[band], 'unit': sensor_of(band).unit}
                for band, mean in self.mean.items()
            },
            'clip': self.clip,
        }

    def normalize(self, bands: Sequence[str]) -> Normalize:
        """Make a normalisation with these statistics.

        Args:
            bands: Names of the channels, in their order. For bands without statistics, those of
                :mod:`geofm.sensors` are used.

        Returns:
            The normalisation.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        mean, std = band_statistics(bands)
        for i, band in enumerate(bands):
            if band in self.mean:
                mean[i], std[i] = self.mean[band], self.std[band]
        return Normalize(bands, mean, std, self.clip)

    def updated(self, other: Self | None, bands: Sequence[str]) -> Self:
        """Combine these statistics for some bands with others for the remaining bands.

        Args:
            other: The other statistics, or None.
            bands: Bands whose statistics are taken from *self*.

        Returns:
            The combined statistics.
        """
        kept = {} if other is None else dict(other.mean), {} if other is None else dict(other.std)
        chosen = [band for band in bands if band in self.mean]
        return type(self)(
            kept[0] | {band: self.mean[band] for band in chosen},
            kept[1] | {band: self.std[band] for band in chosen},
            self.clip,
        )

    def differs(self, other: Self | None = None) -> tuple[str, ...]:
        """Find the bands for which two statistics differ.

        Args:
            other: The other statistics; None for the built-in ones.

        Returns:
            Names of the bands, among those in both statistics; all of these if *clip* differs.
        """
        bands = [band for band in self.mean if other is None or band in other.mean]
        if not bands:
            return ()
        ours = self.normalize(bands)
        theirs = Normalize(bands) if other is None else other.normalize(bands)
        if ours.clip != theirs.clip:
            return tuple(bands)
        same = torch.isclose(ours.mean, theirs.mean) & torch.isclose(ours.std, theirs.std)
        return tuple(
            b for b, equal in zip(bands, same.flatten().tolist(), strict=True) if not equal
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def statistics_of(normalize: Any) -> InputStatistics | None:
    """Return the statistics of the normalisation of a data module.

    Args:
        normalize: Attribute ``aug`` of the data module.

    Returns:
        The statistics; None if *normalize* is not a :class:`~geofm.transforms.Normalize`.
    """
    return InputStatistics.of(normalize) if isinstance(normalize, Normalize) else None


#: Statistics of a model without information about its normalisation: the built-in ones are used.
NO_STATISTICS = InputStatistics({}, {})
