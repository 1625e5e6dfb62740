"""Small scenes for the tests, and a model whose attention is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from geofm.models.attention import TokensAndAttention
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
    pixels = mean[:, None, None] + 0.5 * std[:, None, None] * random
    # Values far from the mean of B10 would be below what the sensor can have measured.
    return pixels.clip(0.9 * SENSORS[key].limits[0]).astype(np.float32)


class GroundModel(nn.Module):
    """Model whose token of a patch is the mean of the normalised bands over the patch.

    Head k of a sensor is the sensor's k-th band, and rollout its first. A token has all bands. Maps
    are divided by the number of patches, so that relative attention does not depend on the
    window. CLS and a register come first and are infinite, because they must not be used.
    """

    depth = 3
    num_prefix_tokens = 2
    has_class_token = True
    pretrained_cfg: ClassVar = {'architecture': 'GroundModel'}

    def __init__(self, bands: Sequence[str], patch_size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.bands = tuple(bands)
        self.sensors = tuple(sensor_channels(bands))
        self.patch_size = patch_size
        self.heads = heads
        self.place = nn.Parameter(torch.zeros(()))
        self.calls: list[Call] = []

    def observe(
        self,
        x: Tensor,
        dates: Tensor | None = None,
        present: Tensor | None = None,
        *,
        block: int | None = None,
        query: Tensor | None = None,
        rollout: bool = False,
    ) -> TokensAndAttention:
        self.calls.append(Call(tuple(x.shape), dates, present, block, query))
        patches = avg_pool2d(x, self.patch_size)
        count = patches.shape[-2] * patches.shape[-1]
        prefix = torch.full((len(x), self.num_prefix_tokens, x.shape[1]), torch.inf)
        channels = sensor_channels(self.bands)
        maps = {key: patches[:, c][:, : self.heads] / count for key, c in channels.items()}
        if query is not None:
            # The tokens of the query patch.
            own = patches.flatten(2)[torch.arange(len(x)), :, query]
            maps = {key: maps[key] * own[:, c][:, : self.heads, None, None]
                    for key, c in channels.items()}  # fmt: skip
        return TokensAndAttention(
            torch.cat([prefix, patches.flatten(2).mT], dim=1),
            {} if block is None else maps,
            {key: patches[:, c[0]] / count for key, c in channels.items()} if rollout else {},
        )


class Call(NamedTuple):
    """Arguments of a call of a model."""

    shape: tuple[int, ...]
    dates: Tensor | None
    present: Tensor | None
    block: int | None
    query: Tensor | None


def cog_problems(path: Path) -> list[str]:
    """Problems that rio-cogeo finds in a Cloud-Optimised GeoTIFF."""
    cogeo = pytest.importorskip('rio_cogeo.cogeo', reason='rio-cogeo validates the rasters')
    fine, errors, notes = cogeo.cog_validate(path, quiet=True)
    return [*errors, *notes, *([] if fine else ['not valid'])]
