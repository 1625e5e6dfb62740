"""Pictures of samples with Sentinel-1 and Sentinel-2 bands."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torchgeo.datasets import RGBBandsMissingError
from torchgeo.datasets.utils import Sample

from geofm.sensors import RGB_BANDS, SENTINEL1, band_indices

#: Percentiles that are drawn black and white, of the valid pixels of each channel.
STRETCH = (2.0, 98.0)

#: Grey of pixels without data.
NO_DATA = 0.5


def stretch(
    channels: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Make a picture of three channels, each stretched between percentiles.

    Args:
        channels: Values, shape (3, H, W).
        valid: Where they mean something, shape (H, W); elsewhere the picture is grey.

    Returns:
        Colours in [0, 1], shape (H, W, 3).
    """
    picture = np.full((*valid.shape, len(channels)), NO_DATA, np.float32)
    if valid.any():
        values = channels[:, valid].T
        low, high = np.percentile(values, STRETCH, axis=0)
        picture[valid] = np.clip((values - low) / np.maximum(high - low, 1e-6), 0, 1)
    return picture


def s1_composite(vv: npt.NDArray[np.float32], vh: npt.NDArray[np.float32]) -> Any:
    """Channels of the usual false-colour picture of dual-polarised SAR.

    Args:
        vv: Co-polarised backscatter in dB, shape (H, W).
        vh: Cross-polarised backscatter in dB, shape (H, W).

    Returns:
        VV, VH and their ratio, which is a difference in dB, shape (3, H, W).
    """
    return np.stack((vv, vh, vv - vh))


def plot_pair(
    sample: Sample,
    bands: Sequence[str],
    *,
    cmap: str | Colormap | None = None,
    show_titles: bool = True,
    suptitle: str | None = None,
) -> Figure:
    """Draw true colour, an S1 composite, and where given mask and prediction.

    Args:
        sample: One sample: 'image' (C, H, W) in raw units, and if given 'valid' (H, W), 'mask'
            (H, W) and 'prediction' (H, W). A 'label' or 'prediction' that is one number is
            written above the true-colour panel.
        bands: Names of the channels.
        cmap: Colours of the classes of mask and prediction.
        show_titles: Whether to write a title above each panel.
        suptitle: Title of the figure.

    Returns:
        The figure.

    Raises:
        RGBBandsMissingError: If the bands have neither B04, B03, B02 nor VV, VH.
    """
    image = sample['image'].detach().cpu().float().numpy()
    valid = np.isfinite(image).all(axis=0)
    if 'valid' in sample:
        valid &= sample['valid'].cpu().numpy().astype(bool)
    panels: dict[str, Any] = {}
    if set(RGB_BANDS) <= set(bands):
        panels['Sentinel-2 true colour'] = stretch(image[band_indices(RGB_BANDS, bands)], valid)
    if set(SENTINEL1.band_names) <= set(bands):
        vv, vh = image[band_indices(SENTINEL1.band_names, bands)]
        panels['Sentinel-1 VV, VH, VV − VH'] = stretch(s1_composite(vv, vh), valid)
    if not panels:
        raise RGBBandsMissingError
    maps = {
        key.capitalize(): sample[key].detach().cpu().numpy()
        for key in ('mask', 'prediction')
        if key in sample and sample[key].squeeze().ndim == 2
    }
    panels |= {title: classes.squeeze() for title, classes in maps.items()}
    # One range for both maps, so that a class has one colour.
    top = max((int(classes.max()) for classes in maps.values()), default=0)

    fig, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 4.4), squeeze=False, layout='constrained'
    )
    for ax, (title, picture) in zip(axes[0], panels.items(), strict=True):
        if title in maps:
            # Ignored pixels are negative and stay blank.
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
