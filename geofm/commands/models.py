"""Commands that hand a backbone on."""

from pathlib import Path
from typing import Literal

from geofm.models import export_torchgeo


def export(checkpoint: Path, output: Path, to: Literal['torchgeo'] = 'torchgeo') -> None:
    """Write a checkpoint's backbone for another tool.

    Args:
        checkpoint: Checkpoint that `geofm fit` wrote.
        output: File to write.
        to: Whose format: `torchgeo` is what SemanticSegmentation takes as weights; Classification
            takes the checkpoint itself.
    """
    print(export_torchgeo(checkpoint, output))
