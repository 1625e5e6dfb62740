"""The command that writes a backbone for other tools."""

from pathlib import Path
from typing import Literal

from geofm.models import export_backbone
from geofm.printing import say


def export(
    checkpoint: Path,
    output: Path,
    to: Literal['geofm', 'timm', 'dinov2', 'torchgeo', 'hub'] = 'geofm',
    sensor: str | None = None,
    license: str | None = None,  # noqa: A002
) -> None:
    """Write a checkpoint's backbone for another tool.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote, or an export of one.
        output: File to write: .safetensors, or .pth, .pt or .ckpt for PyTorch; of hub, a folder.
        to: Whose format. `geofm`: the whole backbone and what rebuilds it. `torchgeo`: the same,
            as Classification and SemanticSegmentation take it as weights. `timm` and `dinov2`:
            the ViT of one sensor, for timm's VisionTransformer or DINOv2's own code.
            `hub`: a folder in timm's hub format with a model card, which says nothing of paths.
        sensor: For timm and dinov2: whose ViT; the only one by default, early fusion's too.
        license: For hub: identifier of the licence that the model card states, e.g. cc-by-4.0.
    """
    exported = export_backbone(checkpoint, output, to, sensor, license)
    say(exported.path)
    if exported.left_out:
        say(f'left out: {", ".join(exported.left_out)}')
