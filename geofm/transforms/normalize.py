"""Normalisation of images by band name, on the device the batch is on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geofm.sensors import BandError, band_statistics, check_bands, check_channels


class Normalize(nn.Module):
    """Bring every band to zero mean and unit standard deviation, and invalid ground to zero.

    Works on one sample or on a batch, on whatever device it is on. The statistics follow the
    image to its device at the first call, so the module may live in a datamodule, which Lightning
    does not move.

    Clipping matters for Sentinel-1: real scenes hold outliers (ships, layover, noise below the
    floor) tens of standard deviations from the mean, which would dominate a loss. At the
    default of 5 standard deviations Sentinel-2 keeps all reflectances up to about 1.3.
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
            mean: Mean of each band in raw units (S1: dB, S2: DN), shape (C,). Default: the mean
                over SEN12MS-CR-TS.
            std: Standard deviation of each band in raw units, shape (C,). Default: that over
                SEN12MS-CR-TS.
            clip: Largest magnitude of a normalised value, in standard deviations; None keeps
                all values.

        Raises:
            BandError: If a band is unknown or given twice, or *mean* or *std* do not hold one
                number a band.
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
                    f'bands {list(self.bands)}: give one number a band'
                )
        if not (std > 0).all():
            raise ValueError(f'standard deviations must be positive, got {std.tolist()}')
        if clip is not None and clip <= 0:
            raise ValueError(f'clip must be positive or None, got {clip}')
        # Given by the arguments, so not part of a checkpoint.
        self.register_buffer('mean', mean.view(-1, 1, 1), persistent=False)
        self.register_buffer('std', std.view(-1, 1, 1), persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Normalise the image of a sample or batch.

        A pixel with a NaN or infinity in any band counts as invalid, whatever ``valid`` says.

        Args:
            batch: Dictionary with 'image' (..., C, H, W) in raw units and, optionally, 'valid'
                bool (..., H, W). Other entries pass untouched.

        Returns:
            A new dictionary with 'image' normalised, 0 (the mean) on invalid ground, and 'valid'
            bool (..., H, W): valid before, and finite in all bands.

        Raises:
            BandError: If the image does not have one channel a band.
        """
        image: Tensor = batch['image']
        mean, std = self._statistics(image)
        # A sum over the bands is finite only if each is; cheaper than a test of every value.
        valid = image.sum(dim=-3, dtype=torch.float32).isfinite()
        if 'valid' in batch:
            valid &= batch['valid']
        # In place after the first step: on a CPU, memory is what this costs.
        normalised = (image - mean).div_(std)
        if self.clip is not None:
            normalised.clamp_(-self.clip, self.clip)
        # Filled, not multiplied by the mask: NaN x 0 is NaN.
        normalised.masked_fill_(~valid.unsqueeze(-3), 0.0)
        return {**batch, 'image': normalised, 'valid': valid}

    def denormalize(self, image: Tensor) -> Tensor:
        """Bring a normalised image back to raw units; clipped values stay clipped.

        Args:
            image: Normalised image, shape (..., C, H, W).

        Returns:
            The image in raw units (S1: dB, S2: DN), same shape.

        Raises:
            BandError: If the image does not have one channel a band.
        """
        mean, std = self._statistics(image)
        return image * std + mean

    def _statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, 1, 1) on the device of the image."""
        check_channels(image, self.bands)
        if self.mean.device != image.device:
            # Lightning validates in inference mode; a tensor made there is no use in training.
            with torch.inference_mode(False):
                self.to(image.device)
        return self.mean, self.std

    def extra_repr(self) -> str:
        """Arguments to show in the printed module."""
        return f'bands={list(self.bands)}, clip={self.clip}'
