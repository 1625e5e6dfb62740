"""CLS attention of a backbone over a scene, as a GeoTIFF and a picture."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import batched, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from rich.progress import Progress
from torch import nn
from torch.utils.data import default_collate

from geofm import __version__
from geofm.maps.figure import plot_attention
from geofm.maps.scene import Scene
from geofm.maps.windows import Floats, Mask, Position, Tile, Tiling, blend
from geofm.maps.writer import Upsampling, replacing, write_raster
from geofm.sensors import SENSORS
from geofm.transforms import Normalize

# GDAL's default, a share of the machine's memory, is more than a row of windows needs.
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class AttentionMap:
    """The files of an attention map.

    Attributes:
        raster: GeoTIFF on the pixel grid of the scene.
        figure: PNG of the scene and its attention.
        bands: Descriptions of the raster's bands.
    """

    raster: Path
    figure: Path
    bands: tuple[str, ...]


class _Window(NamedTuple):
    """Attention in one window: maps (heads, rows, columns) by source, 1 where it is uniform."""

    position: Position
    maps: dict[str, Floats]
    valid: Mask


def attention_map(
    model: nn.Module,
    s1: Path | None,
    s2: Path | None,
    output: Path,
    *,
    block: int = -1,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    upsampling: Upsampling = 'nearest',
    dates: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str | None = None,
) -> AttentionMap:
    """Map how much the CLS token of a backbone attends to each place of a scene.

    The scene may be of any size: it is read in overlapping windows whose patches lie on one grid,
    and windows are blended with a raised cosine. Attention is a distribution over the tokens of a
    window, so it is multiplied by the number of the window's patches before it is blended: 1 means
    what uniform attention would give to a patch, in any window. A scene no larger than a window
    is seen in one pass, and its values are those of the model, times the number of patches.

    The raster has the CRS, bounds and pixels of the Sentinel-2 scene (or of the Sentinel-1 scene
    of a model without Sentinel-2). For each source of attention, the sensors and 'fusion' for
    cross-attention, a band holds the mean over the heads, followed by one band a head. Pixels where
    a sensor has no data are NaN.

    Args:
        model: Backbone, a :class:`geofm.models.MultiSensorViT` or a module with its ``bands``,
            ``sensors``, ``patch_size``, ``depth`` and ``cls_attention``. It is put into eval mode.
        s1: Sentinel-1 raster of VV and VH in dB, or None.
        s2: Sentinel-2 raster in DN, or None.
        output: Folder for ``<scene>_attention.tif`` and ``<scene>_attention.png``, named after
            the raster that gives the grid; made if it isn't there.
        block: Block of the ViTs; negative counts from the last.
        window: Side of a window in pixels, a multiple of the patch size. Best the image size that
            the model was trained with.
        overlap: Least share of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        upsampling: How a pixel gets its value: that of its patch ('nearest'), or interpolated
            between the centres of patches ('bilinear').
        dates: Days of acquisition as YYYY-MM-DD, by sensor ('s1', 's2'). Default: from each
            file's name or metadata.
        checkpoint: File that the model comes from; its SHA-256 is put into the raster's tags.
        device: Device to run on. Default: where the model is.

    Returns:
        Where the files are.

    Raises:
        FileNotFoundError: If a raster is missing.
        IndexError: If the model has no such block.
        ValueError: If a raster is unfit (no CRS, bands missing, smaller than a patch), the two do
            not overlap or hold no data together, the model's sensor is not given, or an
            argument is out of range.
    """
    backbone: Any = model.eval() if device is None else model.to(device).eval()
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} is not positive')
    cache = rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES)
    with cache, Scene(backbone.bands, s1, s2, dates) as scene:
        _report_sensors(scene, backbone.sensors, {'s1': s1, 's2': s2})
        height, width = scene.grid.shape
        if min(height, width) < backbone.patch_size:
            raise ValueError(
                f'{scene.path}: {height} x {width} px is smaller than one patch of the model '
                f'({backbone.patch_size} px)'
            )
        tiling = Tiling.cover((height, width), backbone.patch_size, window, overlap)
        output.mkdir(parents=True, exist_ok=True)
        raster = output / f'{scene.path.stem}_attention.tif'
        figure = raster.with_suffix('.png')
        with Progress() as progress, replacing(raster) as tif, replacing(figure) as png:
            positions = progress.track(tiling, len(tiling), description='Attention')
            windows = _attend(backbone, scene, tiling, positions, block, batch_size)
            first = next(windows)
            heads = {source: len(values) for source, values in first.maps.items()}
            bands = _descriptions(heads, block % backbone.depth)
            tags = {
                'TIFFTAG_SOFTWARE': f'geofm {__version__}',
                'model': _architecture(model),
                'block': str(block % backbone.depth),
                'window': str(window),
                'overlap': str(overlap),
                'upsampling': upsampling,
                'unit': 'CLS attention relative to uniform attention over the patches of a window',
                **{key: Path(raster.src.name).name for key, raster in scene.rasters.items()},
                **{f'{key}_date': str(r.date) for key, r in scene.rasters.items()},
            }
            if checkpoint is not None:
                tags['checkpoint_sha256'] = _sha256(checkpoint)
            strips = blend(tiling, map(_tile, chain([first], windows)))
            known = write_raster(
                tif, scene.grid, backbone.patch_size, bands, strips, upsampling, tags
            )
            if not known:
                names = ' and '.join(raster.src.name for raster in scene.rasters.values())
                raise ValueError(f'{names}: no pixel holds data in every band')
            title = f'CLS attention, block {block % backbone.depth}: {scene.path.stem}'
            plot_attention(scene, tif, heads, title).savefig(png)
    return AttentionMap(raster, figure, bands)


def _report_sensors(
    scene: Scene, sensors: tuple[str, ...], paths: Mapping[str, Path | None]
) -> None:
    """Warn of a sensor that the model knows and doesn't get, or gets and doesn't know."""
    for key, path in paths.items():
        title = SENSORS[key].title
        if key in sensors and key not in scene.rasters:
            warnings.warn(
                f"no {title} raster given (--{key}): the model's learned stand-in takes its place",
                stacklevel=3,
            )
        elif path is not None and key not in scene.rasters:
            warnings.warn(f'{path} is not used: the model has no {title} bands', stacklevel=3)


def _attend(
    backbone: Any,
    scene: Scene,
    tiling: Tiling,
    positions: Iterable[Position],
    block: int,
    batch_size: int,
) -> Iterator[_Window]:
    """Run the model on batches of windows."""
    normalize = Normalize(scene.bands)
    device = next(backbone.parameters()).device
    present = [key in scene.rasters for key in backbone.sensors]
    # The model returns a map of an absent sensor's placeholder pixels, too.
    absent = {key for key in backbone.sensors if key not in scene.rasters}
    patches = tiling.rows.size * tiling.cols.size
    for batch in batched(positions, batch_size):
        samples = default_collate([scene.read(*tiling.pixels(position)) for position in batch])
        with torch.inference_mode():
            inputs = normalize({key: value.to(device) for key, value in samples.items()})
            maps = backbone.cls_attention(
                inputs['image'],
                dates=inputs['dates'],
                block=block,
                present=torch.tensor([present] * len(batch), device=device) if absent else None,
            )
            arrays = {
                source: (patches * weights.float()).cpu().numpy()
                for source, weights in maps.items()
                if source not in absent
            }
        valid = samples['valid'].numpy()
        for k, position in enumerate(batch):
            yield _Window(position, {s: values[k] for s, values in arrays.items()}, valid[k])


def _tile(window: _Window) -> Tile:
    """Stack, source by source, the mean over the heads and the heads."""
    values = [v for m in window.maps.values() for v in (m.mean(axis=0, keepdims=True), m)]
    return Tile(window.position, np.concatenate(values), window.valid)


def _descriptions(heads: Mapping[str, int], block: int) -> tuple[str, ...]:
    """Descriptions of the bands, in the order of :func:`_tile`."""
    return tuple(
        f'{source} {f"block {block}" if source in SENSORS else "last layer"} {what}'
        for source, count in heads.items()
        for what in ('mean', *(f'head {head}' for head in range(count)))
    )


def _architecture(model: nn.Module) -> str:
    config = getattr(model, 'pretrained_cfg', None) or {}
    return config.get('architecture') or type(model).__name__


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
