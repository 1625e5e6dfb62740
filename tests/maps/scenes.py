"""Small scenes for the tests, and a model whose attention is known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from geofm.sensors import SENSORS, sensor_channels

UTM = CRS.from_epsg(32630)
NORTH_UP = Affine(10, 0, 500_000, 0, -10, 4_200_000)


def write(
    path: Path,
    pixels: npt.NDArray[np.generic],
    crs: CRS | None = UTM,
    transform: Affine = NORTH_UP,
    descriptions: Sequence[str] | None = None,
    nodata: float | None = None,
) -> Path:
    count, height, width = pixels.shape
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        dtype=pixels.dtype,
        count=count,
        height=height,
        width=width,
        crs=crs,
        transform=transform,
        nodata=nodata,
    ) as dst:
        dst.write(pixels)
        if descriptions is not None:
            dst.descriptions = tuple(descriptions)
    return path


def noise(key: str, height: int, width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Pixels of a sensor in its usual range: float32 (C, H, W)."""
    bands = SENSORS[key].bands
    mean, std = (np.array([getattr(b, what) for b in bands]) for what in ('mean', 'std'))
    random = np.random.default_rng(seed).standard_normal((len(bands), height, width))
    return (mean[:, None, None] + 0.5 * std[:, None, None] * random).astype(np.float32)


class GroundModel(nn.Module):
    """Attention of a patch is the mean of a normalised band over it: ground alone decides.

    Head k of a sensor shows the sensor's k-th band. It is divided by the number of patches, so
    that relative attention does not depend on the window.
    """

    depth = 3

    def __init__(self, bands: Sequence[str], patch_size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.bands = tuple(bands)
        self.sensors = tuple(sensor_channels(bands))
        self.patch_size = patch_size
        self.heads = heads
        self.place = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[tuple[int, ...], Tensor | None, int, Tensor | None]] = []

    def cls_attention(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        block: int = -1,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        self.calls.append((tuple(x.shape), dates, block, present))
        patches = avg_pool2d(x, self.patch_size)
        count = patches.shape[-2] * patches.shape[-1]
        channels = sensor_channels(self.bands)
        return {key: patches[:, c][:, : self.heads] / count for key, c in channels.items()}
