"""The command that writes a backbone for other tools."""

from pathlib import Path
from typing import Literal

from geofm.messages import UsageError
from geofm.printing import say


def export(
    checkpoint: Path,
    output: Path,
    to: Literal['geofm', 'timm', 'dinov2', 'torchgeo', 'hub', 'onnx', 'pt2'] = 'geofm',
    sensor: str | None = None,
    license: str | None = None,  # noqa: A002
    half: bool = False,
) -> None:
    """Write the backbone of a checkpoint in another format, or as a program for other tools.

    Args:
        checkpoint: Checkpoint written by `geofm fit`, or an export of one. For `onnx` and `pt2`,
            also the checkpoint of a fine-tuned task.
        output: File to write: .safetensors, or .pth, .pt or .ckpt for PyTorch. For `hub`, a folder;
            for `onnx` and `pt2`, a file with that suffix.
        to: Format. `geofm`: the whole backbone with its configuration. `torchgeo`: the same, as
            weights for the tasks of TorchGeo. `timm` and `dinov2`: the ViT of one sensor, for
            timm's VisionTransformer or the code of DINOv2. `hub`: a folder in timm's hub format
            with a model card. `onnx` and `pt2`: a program for ONNX Runtime or torch.export.load
            that takes raw values and runs without geofm.
        sensor: For `timm` and `dinov2`: key of the sensor whose ViT is written. Needed only if
            there are several ViTs.
        license: For `hub`: identifier of the licence in the model card, e.g. cc-by-4.0.
        half: For `hub`: write the weights in float16, at half the size.
    """
    if to == 'onnx' or to == 'pt2':
        if sensor is not None or license is not None or half:
            raise UsageError(f'--to {to} takes neither --sensor nor --license nor --half')
        from rich.console import Console

        from geofm.deploy import TOLERANCE, deploy

        with Console(stderr=True).status('tracing, writing and comparing with PyTorch'):
            deployed = deploy(checkpoint, output, to)
        say(deployed.path)
        for name, columns in deployed.network.inputs.items():
            say(f'input {name}: {", ".join(columns)}')
        say(f'outputs: {", ".join(deployed.network.outputs)}')
        say(
            f'largest difference from PyTorch: {deployed.difference:.1e} (tolerance: {TOLERANCE:g})'
        )
        return
    from geofm.models import export_backbone

    exported = export_backbone(checkpoint, output, to, sensor, license, half)
    say(exported.path)
    if exported.left_out:
        say(f'left out: {", ".join(exported.left_out)}')
