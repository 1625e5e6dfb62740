"""Draw samples, each sensor in its own way."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torchgeo.datasets import RGBBandsMissingError
from torchgeo.datasets.utils import Sample

from geofm.sensors import SENSORS, Sensor, sensor_channels
from geofm.stretch import stretch as percentile_stretch

#: Grey level of invalid pixels.
NO_DATA = 0.5


def stretch(
    channels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Convert channels to brightness, from the 2nd to the 98th percentile of the valid pixels.

    Args:
        channels: Values, shape (K, H, W), with K = 3 for a colour image.
        valid: Mask of valid pixels, shape (H, W). Other pixels are grey.

    Returns:
        Brightness in [0, 1], shape (H, W, K).
    """
    picture = percentile_stretch(channels, valid)
    return np.where(valid[..., None], np.moveaxis(picture, 0, -1), np.float32(NO_DATA))


def compose(
    image: npt.NDArray[np.float32], bands: Sequence[str], sensor: Sensor
) -> npt.NDArray[np.float32] | None:
    """Compute the channels of a sensor's image from :attr:`geofm.sensors.Sensor.drawing`.

    Args:
        image: Raw values, shape (C, H, W).
        bands: Names of the channels.
        sensor: The sensor.

    Returns:
        One or three channels, shape (1 or 3, H, W), that are bands or differences of two bands;
        None if a band is missing.
    """
    if not set(sensor.picture_bands) <= set(bands):
        return None
    values = {b: image[list(bands).index(sensor.channel(b))] for b in sensor.drawing.bands}
    return np.stack(
        [
            values[band] if minus is None else values[band] - values[minus]
            for band, minus in sensor.drawing.terms
        ]
    )


def colours(
    channels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], sensor: Sensor
) -> npt.NDArray[np.float32]:
    """Colour the channels of a sensor's image.

    Args:
        channels: Channels as returned by :func:`compose`, shape (1 or 3, H, W).
        valid: Mask of valid pixels, shape (H, W). Other pixels are grey.
        sensor: The sensor.

    Returns:
        Colours in [0, 1], shape (H, W, 3). Three channels are red, green and blue; one channel is
        drawn with the sensor's colour map.
    """
    picture = stretch(channels, valid)
    if len(channels) == 3:
        return picture
    coloured = mpl.colormaps[sensor.drawing.cmap](picture[..., 0])[..., :3].astype(np.float32)
    coloured[~valid] = NO_DATA
    return coloured


def drawing_order(bands: Sequence[str], reference: str | None = None) -> list[Sensor]:
    """Return the sensors of some bands in the order in which they are drawn.

    Args:
        bands: Names of the channels.
        reference: Key of the sensor whose grid is used. Default: that of
            :func:`geofm.sensors.reference_sensor`.

    Returns:
        The sensors, starting with the one of the reference grid.
    """
    sensors = [SENSORS[key] for key in sensor_channels(bands)]
    return sorted(sensors, key=lambda s: (s.name != reference, -s.grid_priority))


def plot_pair(
    sample: Sample,
    bands: Sequence[str],
    *,
    cmap: str | Colormap | None = None,
    show_titles: bool = True,
    suptitle: str | None = None,
) -> Figure:
    """Draw an image per sensor, and mask and prediction if the sample has them.

    Args:
        sample: Sample with 'image' (C, H, W) in raw units and optionally 'valid' (H, W), 'mask' (H,
            W) and 'prediction' (H, W). A scalar 'label' or 'prediction' is shown in the title of
            the first panel.
        bands: Names of the channels.
        cmap: Colour map of mask and prediction.
        show_titles: Whether to show a title above each panel.
        suptitle: Title of the figure.

    Returns:
        The figure.

    Raises:
        RGBBandsMissingError: If no sensor has all bands needed for its image, e.g. B04, B03 and B02
            of Sentinel-2.
    """
    image = sample['image'].detach().cpu().float().numpy()
    valid = np.isfinite(image).all(axis=0)
    if 'valid' in sample:
        valid &= sample['valid'].cpu().numpy().astype(bool)
    panels: dict[str, Any] = {}
    for sensor in drawing_order(bands):
        channels = compose(image, bands, sensor)
        if channels is not None:
            title = sensor.picture_title
            panels[title if title not in panels else f'{title} ({sensor.name})'] = colours(
                channels, valid, sensor
            )
    if not panels:
        raise RGBBandsMissingError
    maps = {
        key.capitalize(): sample[key].detach().cpu().numpy()
        for key in ('mask', 'prediction')
        if key in sample and sample[key].squeeze().ndim == 2
    }
    panels |= {title: classes.squeeze() for title, classes in maps.items()}
    # Use the same range for both maps, so that a class has the same colour in both.
    top = max((int(classes.max()) for classes in maps.values()), default=0)

    fig, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 4.4), squeeze=False, layout='constrained'
    )
    for ax, (title, picture) in zip(axes[0], panels.items(), strict=True):
        if title in maps:
            # Ignored pixels are negative and left blank.
            picture = np.ma.masked_less(picture, 0)
            ax.imshow(picture, cmap=cmap, vmin=0, vmax=max(top, 1), interpolation='nearest')
        else:
            ax.imshow(picture, interpolation='nearest')
        ax.axis('off')
        if show_titles:
            ax.set_title(title)
    scalars = [
        f'{key}: {int(sample[key])}'
        for key in ('label', 'prediction')
        if key in sample and sample[key].numel() == 1
    ]
    if show_titles and scalars:
        axes[0, 0].set_title(f'{axes[0, 0].get_title()}\n{", ".join(scalars)}')
    if suptitle is not None:
        fig.suptitle(suptitle)
    return fig
