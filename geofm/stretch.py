"""Percentile stretches of pictures and colour scales."""

from typing import Any

import numpy as np
import numpy.typing as npt

#: Percentiles that are drawn black and white in pictures.
PICTURE = (2.0, 98.0)

#: Percentiles at the ends of colour scales, so that they do not depend on a few extreme values.
SCALE = (1.0, 99.0)


def value_range(values: npt.NDArray[Any], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Return two percentiles of the finite values of an array.

    Args:
        values: Values, of any shape.
        percentiles: The percentiles, 0 to 100.

    Returns:
        Values of the percentiles; 0 and 1 if no value is finite.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, percentiles)
    return float(low), float(high)


def stretch(channels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Stretch each channel from the 2nd to the 98th percentile of its valid pixels.

    Args:
        channels: Values, shape (K, H, W).
        valid: Which pixels are valid, shape (H, W).

    Returns:
        Brightness in [0, 1], shape (K, H, W); 0 for pixels that are not valid.
    """
    picture = np.zeros(channels.shape, np.float32)
    for channel, brightness in zip(channels, picture, strict=True):
        low, high = value_range(channel[valid], PICTURE)
        brightness[valid] = np.clip((channel[valid] - low) / max(high - low, 1e-6), 0, 1)
    return picture
