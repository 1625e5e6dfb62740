"""Write ``torch.export`` programs to files."""

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from geofm.atomic import atomic_file
from geofm.deploy.network import Network
from geofm.deploy.program import compare
from geofm.models.checkpoints import METADATA

#: Name of the metadata among the extra files.
EXTRA = f'{METADATA}.json'


def write_pt2(network: Network, program: ExportedProgram, path: Path) -> float:
    """Write a program, and compare its outputs with PyTorch.

    Args:
        network: The network.
        program: The network, traced by :func:`~geofm.deploy.program.trace`.
        path: The file.

    Returns:
        The largest difference.

    Raises:
        ValueError: If the difference is too large, or the program does not run at another size. No
            file is written then.
    """
    with atomic_file(path) as part:
        torch.export.save(program, part, extra_files={EXTRA: json.dumps(network.metadata())})
        written = torch.export.load(part).module()
        return compare(network, written, path)
