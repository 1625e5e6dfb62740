"""Commands that draw what a backbone sees."""

from pathlib import Path
from typing import Literal

from geofm.maps import attention_map
from geofm.models import load_backbone


def attention(
    checkpoint: Path,
    output: Path,
    s1: Path | None = None,
    s2: Path | None = None,
    block: int = -1,
    window: int = 224,
    overlap: float = 0.5,
    batch_size: int = 8,
    upsampling: Literal['nearest', 'bilinear'] = 'nearest',
    device: str | None = None,
) -> None:
    """Draw where a backbone looks, as a GeoTIFF that lies on the scene and a PNG.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        output: Folder to write to.
        s1: Sentinel-1 scene: VV and VH in dB.
        s2: Sentinel-2 scene: 13 bands as DN.
        block: Block of the ViTs; negative counts from the last.
        window: Side of a window in pixels, a multiple of the patch size.
        overlap: Least share of a window that the next one covers too, in [0, 1).
        batch_size: Windows a forward pass.
        upsampling: How a pixel gets the value of its patch.
        device: Where to compute, e.g. cuda; chosen by itself if not given.
    """
    result = attention_map(
        load_backbone(checkpoint),
        s1,
        s2,
        output,
        block=block,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        upsampling=upsampling,
        checkpoint=checkpoint,
        device=device,
    )
    print(f'{result.raster}\n{result.figure}')
