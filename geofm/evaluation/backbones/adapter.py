"""Preparing images for a backbone: its bands, their order, and its normalisation."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from geofm.sensors import BandError, check_channels, sensor_of
from geofm.transforms import NO_STATISTICS, InputStatistics, Normalize

#: Values for a band that the data lack: the mean of the band, or zero.
Missing = Literal['mean', 'zero']


class Transformed(nn.Module):
    """The normalisation of pretrained weights, with invalid pixels set to zero."""

    def __init__(self, *transforms: nn.Module) -> None:
        """Initialize a new Transformed instance.

        Args:
            *transforms: Transforms of images (B, C, H, W) in dB and DN to the input of the model.
        """
        super().__init__()
        self.transforms = nn.Sequential(*transforms)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Normalise the images of a batch.

        Args:
            batch: Batch with 'image' (B, C, H, W) and optionally 'valid', bool (B, H, W).

        Returns:
            A new batch with the normalised 'image' and 'valid'.
        """
        image: Tensor = batch['image']
        valid = image.isfinite().all(dim=-3)
        if 'valid' in batch:
            valid = valid & batch['valid']
        # nan_to_num makes a copy: torchvision's normalisation may work in place.
        normalised = self.transforms(image.nan_to_num())
        return {
            **batch,
            'image': normalised.masked_fill(~valid.unsqueeze(-3), 0.0),
            'valid': valid,
        }


class Adapter(nn.Module):
    """Module that prepares batches of the data for a backbone.

    Bands are matched by name. Filled bands and resized images are reported in :attr:`lines`.

    Attributes:
        bands: Channels of the output.
        filled: Channels of the output that the data lack.
        lines: Messages on how the images are changed.
    """

    def __init__(
        self,
        data_bands: Sequence[str],
        bands: Sequence[str],
        normalise: nn.Module | None = None,
        statistics: Mapping[str, tuple[float, float]] | None = None,
        missing: Missing | None = None,
        image_size: int | None = None,
        multiple: int = 1,
        clip: float | None = NO_STATISTICS.clip,
    ) -> None:
        """Initialize a new Adapter instance.

        Args:
            data_bands: Channels of the data.
            bands: Channels of the backbone.
            normalise: Normalisation of the backbone's channels. None: by the mean and standard
                deviation of each band.
            statistics: Mean and standard deviation by band, for bands that are not normalised by
                the statistics of :mod:`geofm.sensors`.
            missing: Values for a band that the data lack. None: a missing band is an error.
            image_size: Side in pixels to which images are resized. None: they are not resized.
            multiple: Number that the sides of images must be a multiple of.
            clip: Maximum magnitude of values normalised by band. None: values are not clipped.

        Raises:
            BandError: If the data lack a band and *missing* is None.
        """
        super().__init__()
        self.data_bands = tuple(data_bands)
        self.bands = tuple(bands)
        self.filled = tuple(band for band in bands if band not in data_bands)
        if self.filled and missing is None:
            raise BandError(
                f'missing bands {list(self.filled)}: the data have {list(data_bands)}. '
                "missing_bands: 'mean' fills them with their mean, 'zero' with zeros"
            )
        known = [band for band in bands if band in data_bands]
        self.pick = [list(data_bands).index(band) for band in known]
        self.missing = missing
        self.image_size = image_size
        self.multiple = multiple
        self.lines: list[str] = []
        if normalise is None:
            self.normalise: nn.Module = _by_band(self.bands, statistics or {}, clip)
        else:
            self.normalise = normalise
        self._place = [self.bands.index(band) for band in known]
        if self.filled:
            self.lines.append(
                f'bands {list(self.filled)} are not in the data: filled with '
                + ('their mean' if missing == 'mean' else 'zeros')
            )

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare a batch.

        Args:
            batch: Batch with the raw 'image' (B, C, H, W) and optionally 'valid', bool (B, H, W).

        Returns:
            The batch with the normalised 'image' (B, K, H', W') of :attr:`bands`, and 'valid' of
            the size of the data.

        Raises:
            BandError: If the image does not have one channel per band of the data.
            ValueError: If the images are not of shape (B, C, H, W), such as time series.
        """
        image: Tensor = batch['image']
        if image.ndim != 4:
            raise ValueError(
                f'images of shape {tuple(image.shape)}: they must be of a single date, (B, C, H, W)'
            )
        check_channels(image, self.data_bands)
        image = image[:, self.pick]
        if self.filled:
            every = image.new_zeros(len(image), len(self.bands), *image.shape[-2:])
            every[:, self._place] = image
            image = every
        prepared: dict[str, Any] = self.normalise({**batch, 'image': image})
        if self.filled and self.missing == 'mean':
            prepared['image'][:, [self.bands.index(band) for band in self.filled]] = 0.0
        prepared['image'] = self._resize(prepared['image'])
        return prepared

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the input size of the backbone for images of a given size.

        Args:
            height: Height of an image in pixels.
            width: Width of an image in pixels.

        Returns:
            Height and width of the input.
        """
        if self.image_size is not None:
            return self.image_size, self.image_size
        up = self.multiple
        return -(-height // up) * up, -(-width // up) * up

    def _resize(self, image: Tensor) -> Tensor:
        size = self.size_of(*image.shape[-2:])
        if size == tuple(image.shape[-2:]):
            return image
        height, width = image.shape[-2:]
        line = f'images of {height} x {width} px are resized to {size[0]} x {size[1]}'
        if line not in self.lines:
            self.lines.append(line)
        return interpolate(image, size, mode='bilinear', antialias=True)

    def extra_repr(self) -> str:
        """Arguments to show in the printed module."""
        return (
            f'pick={self.pick}, bands={list(self.bands)}, missing={self.missing}, '
            f'image_size={self.image_size}, multiple={self.multiple}'
        )


def _by_band(
    bands: Sequence[str], statistics: Mapping[str, tuple[float, float]], clip: float | None
) -> Normalize:
    """Return the normalisation by the mean and standard deviation of each band."""
    mean, std = ({band: pair[i] for band, pair in statistics.items()} for i in range(2))
    return InputStatistics(mean, std, clip).normalize(bands)


def absent_sensors(data_bands: Sequence[str], bands: Sequence[str]) -> tuple[str, ...]:
    """Return the sensors of a backbone for which the data have no bands.

    Args:
        data_bands: Channels of the data.
        bands: Channels of the backbone.

    Returns:
        Keys of the sensors.
    """
    wanted = dict.fromkeys(sensor_of(band).name for band in bands)
    have = {sensor_of(band).name for band in data_bands}
    return tuple(key for key in wanted if key not in have)
