"""From images of the data to the input of a backbone: its bands, its order, its normalisation."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from geofm.sensors import BandError, check_channels, sensor_of
from geofm.transforms import NO_STATISTICS, InputStatistics, Normalize

#: What stands for a band that the data lack: the mean of the band, or the value zero.
Missing = Literal['mean', 'zero']


class Transformed(nn.Module):
    """A normalisation that comes with a model's weights, with invalid ground brought to zero."""

    def __init__(self, *transforms: nn.Module) -> None:
        """Initialize a new Transformed instance.

        Args:
            *transforms: From images (B, C, H, W) in dB and DN to what the model takes.
        """
        super().__init__()
        self.transforms = nn.Sequential(*transforms)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Normalise the image of a batch.

        Args:
            batch: Has 'image' (B, C, H, W) and may have 'valid' bool (B, H, W).

        Returns:
            A new dictionary with 'image' normalised and 'valid'.
        """
        image: Tensor = batch['image']
        valid = image.isfinite().all(dim=-3)
        if 'valid' in batch:
            valid = valid & batch['valid']
        # A copy: normalisation of torchvision may be in place.
        normalised = self.transforms(image.nan_to_num())
        return {
            **batch,
            'image': normalised.masked_fill(~valid.unsqueeze(-3), 0.0),
            'valid': valid,
        }


class Adapter(nn.Module):
    """Bring a batch of the data to what a backbone takes.

    Bands are matched by name. Every step that changes more than their order is told in
    :attr:`lines`.

    Attributes:
        bands: Channels of the output.
        filled: Bands among them that the data lack.
        lines: What is done, for people.
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
            normalise: Normalisation of the backbone's channels; None: by the mean and standard
                deviation of each band.
            statistics: Mean and std by band, where they are not those of
                :mod:`geofm.sensors`.
            missing: What stands for a band that the data lack; None: an error.
            image_size: Side to which images are resized; None: as they are.
            multiple: What a side must be a multiple of.
            clip: Largest magnitude of a value normalised by band; None: any.

        Raises:
            BandError: If the data lack a band, and *missing* does not say what to do.
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
            batch: Has 'image' (B, C, H, W), raw, and may have 'valid' bool (B, H, W).

        Returns:
            The batch with 'image' (B, K, H', W') normalised, its channels :attr:`bands`, and
            'valid' of the size of the data.

        Raises:
            BandError: If the image does not have one channel for each band of the data.
            ValueError: If there are several dates.
        """
        image: Tensor = batch['image']
        if image.ndim != 4:
            raise ValueError(
                f'images of shape {tuple(image.shape)}: one date at a time, (B, C, H, W), is needed'
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
        """Size to which images of a size are brought.

        Args:
            height: Height of an image in pixels.
            width: Width of an image in pixels.

        Returns:
            Height and width that the backbone gets.
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
    """Normalisation by the mean and standard deviation of each band."""
    mean, std = ({band: pair[i] for band, pair in statistics.items()} for i in range(2))
    return InputStatistics(mean, std, clip).normalize(bands)


def absent_sensors(data_bands: Sequence[str], bands: Sequence[str]) -> tuple[str, ...]:
    """Sensors of a backbone of which the data have no band at all.

    Args:
        data_bands: Channels of the data.
        bands: Channels of the backbone.

    Returns:
        Keys of the sensors.
    """
    wanted = dict.fromkeys(sensor_of(band).name for band in bands)
    have = {sensor_of(band).name for band in data_bands}
    return tuple(key for key in wanted if key not in have)
