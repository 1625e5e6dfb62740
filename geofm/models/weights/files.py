"""Files of weights: told apart by their content, written beside and renamed."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geofm.atomic import atomic_file

#: Where safetensors' metadata hold what this project says of a file, as JSON.
METADATA = 'geofm'

#: Suffixes of the files that ``torch.save`` writes.
TORCH_SUFFIXES = ('.pth', '.pt', '.ckpt')

#: What reading a file that is no checkpoint may raise: its bytes are run as pickle's opcodes.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
)


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be used here."""


def read_file(path: Path) -> Any:
    """Read a file of weights, whatever its name.

    Args:
        path: The file, as ``torch.save`` or safetensors writes them.

    Returns:
        What ``torch.save`` was given; of safetensors, a dictionary with the tensors under
        ``state_dict`` and, if this project wrote it, what it said of them under
        :data:`METADATA`.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f'{path}: no such file')
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(
            f'{path}: not a readable PyTorch checkpoint, or it holds more than weights. '
            'Give a .ckpt that `geofm fit` wrote, or a file of weights (.pth, .safetensors)'
        ) from error


def _is_safetensors(path: Path) -> bool:
    # The length of the header in 8 bytes, then a JSON object.
    with path.open('rb') as file:
        return file.read(9)[8:] == b'{'


def _read_safetensors(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {'state_dict': load_file(path)}
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata() or {}
    if METADATA in metadata:
        content[METADATA] = json.loads(metadata[METADATA])
    return content


def write_torch(content: Any, path: Path) -> Path:
    """Write a file as ``torch.save`` does.

    Args:
        content: What to write.
        path: The file.

    Returns:
        The file.
    """
    with atomic_file(path) as part:
        torch.save(content, part)
    return path


def write_weights(
    tensors: Mapping[str, Tensor], path: Path, said: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors by name, as the file's suffix says.

    Args:
        tensors: Tensors by name.
        path: The file: ``.safetensors``, or one of :data:`TORCH_SUFFIXES`.
        said: What to say of them in the metadata of safetensors; values of JSON.

    Returns:
        The file.
    """
    if path.suffix in TORCH_SUFFIXES:
        return write_torch(dict(tensors), path)
    metadata = {'format': 'pt'} | ({METADATA: json.dumps(said)} if said else {})
    return write_safetensors(tensors, path, metadata)


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file.

    Args:
        tensors: Tensors by name.
        path: The file.
        metadata: What to say of them.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        with atomic_file(path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, dict(metadata))
    except SafetensorError as error:
        # What was written is gone by then, so a full disk shows in the text only.
        raise OSError(f'{path}: {error}') from error
    return path


def check_suffix(path: Path) -> None:
    """Check that a file's suffix says how to write it.

    Args:
        path: The file.

    Raises:
        ValueError: If it does not.
    """
    if path.suffix not in (*TORCH_SUFFIXES, '.safetensors'):
        raise ValueError(
            f'{path}: the suffix says how to write it: .safetensors, or one of '
            f'{", ".join(TORCH_SUFFIXES)} for PyTorch'
        )
