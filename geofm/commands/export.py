"""The command that writes a backbone for other tools."""

from pathlib import Path
from typing import Literal

from geofm.models import export_backbone
from geofm.printing import say


def export(
    checkpoint: Path,
    output: Path,
    to: Literal['geofm', 'timm', 'dinov2', 'torchgeo'] = 'geofm',
    sensor: str | None = None,
) -> None:
    """Write a checkpoint's backbone for another tool.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote, or an export of one.
        output: File to write: .safetensors, or .pth, .pt or .ckpt for PyTorch.
        to: Whose format. `geofm`: the whole backbone and what rebuilds it. `torchgeo`: the same,
            as Classification and SemanticSegmentation take it as weights. `timm` and `dinov2`:
            the ViT of one sensor, for timm's VisionTransformer or DINOv2's own code.
        sensor: For timm and dinov2: whose ViT; the only one by default, early fusion's too.
    """
    exported = export_backbone(checkpoint, output, to, sensor)
    say(exported.path)
    if exported.left_out:
        say(f'left out: {", ".join(exported.left_out)}')
