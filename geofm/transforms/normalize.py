"""Normalisation of images by band name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.sensors import BandError, band_statistics, check_bands, check_channels


class Normalize(nn.Module):
    """Normalise bands to zero mean and unit standard deviation, and set invalid pixels to zero.

    The input is a sample or a batch on any device. The statistics are moved to the device of the
    image at the first call, since Lightning does not move the modules of a data module.

    Clipping is important for Sentinel-1: scenes contain outliers (ships, layover, thermal noise)
    that are tens of standard deviations from the mean and would dominate a loss. The default of 5
    standard deviations keeps reflectances of Sentinel-2 up to about 1.3.
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
