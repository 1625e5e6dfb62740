"""Write a checkpoint's network to a file that runs without geofm."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from geofm.deploy.network import BackboneNetwork, Network, TaskNetwork
from geofm.deploy.program import trace
from geofm.models.checkpoints import build_backbone, read_model
from geofm.tasks import load_fine_tuned

#: Formats, which are also the suffixes of their files.
Format = Literal['onnx', 'pt2']


@dataclass(frozen=True)
class Deployed:
    """Result of :func:`deploy`.

    Attributes:
        path: The file.
        network: The network in the file.
        difference: Largest difference between the outputs of the file and of PyTorch, see
            :func:`geofm.deploy.program.compare`.
    """

    path: Path
    network: Network
    difference: float


def deploy(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], to: Format
) -> Deployed:
    """Write a backbone or a fine-tuned task as a program that takes raw values.

    * ``onnx``: for ONNX Runtime and others. Weights above 2 GB go to a second file next to it, as
      ONNX requires.
    * ``pt2``: for ``torch.export.load``.

    Both accept any batch size, height and width, include the normalisation, and describe their
    inputs in their metadata. The file is only kept if its outputs agree with those of PyTorch.

    Args:
        checkpoint: Lightning checkpoint of a pretraining task, an export of it, or a
            checkpoint of a task that :func:`geofm.tasks.load_fine_tuned` reads.
        output: File to write, with the suffix of the format.
        to: The format.

    Returns:
        The file, its network, and its difference from PyTorch.

    Raises:
        CheckpointError: If the checkpoint cannot be read, is of another kind or cannot be traced.
        ModuleNotFoundError: If a library for writing ONNX is missing.
        ValueError: If the suffix is not that of the format, or the outputs differ from PyTorch.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if to not in get_args(Format):
        raise ValueError(f'to must be one of {list(get_args(Format))}, not {to!r}')
    if output.suffix != f'.{to}':
        raise ValueError(f'{output}: name it .{to}')
    if to == 'onnx':
        from geofm.deploy.onnx_file import write_onnx as write
    else:
        from geofm.deploy.program import write_pt2 as write
    network = load_network(checkpoint)
    # Leave the caller's random state unchanged.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = trace(network, checkpoint)
        difference = write(network, program, output)
    return Deployed(output, network, difference)


def load_network(checkpoint: Path) -> Network:
    """Load a backbone or a fine-tuned task as a network that takes raw values.

    Args:
        checkpoint: As for :func:`deploy`.

    Returns:
        The network, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is of another kind.
    """
    file = read_model(checkpoint)
    if file.pretrained is not None:
        return BackboneNetwork(build_backbone(file.pretrained)).eval()
    return TaskNetwork(load_fine_tuned(file)).eval()
