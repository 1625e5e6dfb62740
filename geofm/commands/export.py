"""The command that writes a backbone for other tools."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from geofm.models import export_backbone
from geofm.printing import say


def export(
    checkpoint: Path,
    output: Path,
    to: Literal['geofm', 'timm', 'dinov2', 'torchgeo', 'hub', 'onnx', 'pt2'] = 'geofm',
    sensor: str | None = None,
    license: str | None = None,  # noqa: A002
    half: bool = False,
) -> None:
    """Write a checkpoint's backbone for another tool.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote, or an export of one. For onnx and pt2, also
            of a fine-tuned task.
        output: File to write: .safetensors, or .pth, .pt or .ckpt for PyTorch; of hub, a folder;
            of onnx and pt2, a file with that suffix.
        to: Whose format. `geofm`: the whole backbone and what rebuilds it. `torchgeo`: the same,
            as Classification and SemanticSegmentation take it as weights. `timm` and `dinov2`:
            the ViT of one sensor, for timm's VisionTransformer or DINOv2's own code.
            `hub`: a folder in timm's hub format with a model card, which says nothing of paths.
            `onnx` and `pt2`: a program that runs without geofm, from raw values to its output, in
            ONNX or as torch.export.load reads it.
        sensor: For timm and dinov2: whose ViT; the only one by default, early fusion's too.
        license: For hub: identifier of the licence that the model card states, e.g. cc-by-4.0.
        half: For hub: write the weights in float16, half the size.
    """
    if to == 'onnx' or to == 'pt2':
        # TorchGeo's tasks take seconds to import.
        from geofm.deploy import deploy
        from geofm.deploy.program import TOLERANCE

        if sensor is not None or license is not None or half:
            raise ValueError(f"'{to}' takes neither sensor nor license nor half")
        with Console(stderr=True).status('tracing, writing and comparing with PyTorch'):
            deployed = deploy(checkpoint, output, to)
        say(deployed.path)
        for name, columns in deployed.network.inputs.items():
            say(f'input {name}: {", ".join(columns)}')
        say(f'outputs: {", ".join(deployed.network.outputs)}')
        say(
            f'largest difference from PyTorch: {deployed.difference:.1e} (at most {TOLERANCE:g} is '
            'accepted)'
        )
        return
    exported = export_backbone(checkpoint, output, to, sensor, license, half)
    say(exported.path)
    if exported.left_out:
        say(f'left out: {", ".join(exported.left_out)}')
