"""Programs of ``torch.export`` in files."""

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from geofm.atomic import atomic_file
from geofm.deploy.network import Network
from geofm.deploy.program import compare
from geofm.models.checkpoints.files import METADATA

#: Name of the metadata among the extra files.
EXTRA = f'{METADATA}.json'


def write_pt2(network: Network, program: ExportedProgram, path: Path) -> float:
    """Write a program, and compare what was written with PyTorch.

    Args:
        network: The network.
        program: What :func:`~geofm.deploy.program.trace` made of it.
        path: The file.

    Returns:
        The largest difference.

    Raises:
        ValueError: If it is too large, or the program does not run at another size. Nothing is
            written then.
    """
    with atomic_file(path) as part:
        torch.export.save(program, part, extra_files={EXTRA: json.dumps(network.metadata())})
        written = torch.export.load(part).module()
        return compare(network, written, path)
