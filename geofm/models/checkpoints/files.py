"""Read files of weights in any format, and write them atomically."""

import errno
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geofm.atomic import atomic_file
from geofm.models.checkpoints.sharded import is_sharded, read_sharded

#: Key of geofm's description of a file, JSON in the metadata of safetensors.
METADATA = 'geofm'

#: Name of the file of weights in a folder in timm's hub format.
HUB_WEIGHTS = 'model.safetensors'

#: Weights that come with the package: one folder in timm's hub format per name.
RELEASES = Path(__file__).parents[2] / 'releases'

#: Suffixes of the files that ``torch.save`` writes.
TORCH_SUFFIXES = ('.pth', '.pt', '.ckpt')

#: PyTorch's message about an object of a class in a file.
_CLASS = re.compile(r'(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]{1,80})')


class CheckpointError(ValueError):
    """Raised when a file is not a usable checkpoint."""


def read_file(path: Path) -> Any:
    """Read a file of weights. The format is detected from the content.

    Args:
        path: File written by ``torch.save`` or safetensors; folder in timm's hub format, whose
            ``model.safetensors`` is read; sharded checkpoint; or name of weights that come with the
            package, see :func:`released`.

    Returns:
        The object given to ``torch.save``. For a sharded checkpoint, its content without the state
        of optimizers. For safetensors, a dictionary with the tensors under ``state_dict`` and
        geofm's description of them, if any, under :data:`METADATA`.

    Raises:
        CheckpointError: If there is no such file, or it cannot be read.
    """
    if not path.exists() and str(path) in released():
        path = RELEASES / path
    if (path / HUB_WEIGHTS).is_file():
        path = path / HUB_WEIGHTS
    if not path.is_file() and not is_sharded(path):
        raise CheckpointError(f'{path}: ' + ('is a folder' if path.is_dir() else 'no such file'))
    try:
        if path.is_dir():
            return read_sharded(path)
        if _is_safetensors(path):
            content: dict[str, Any] = {'state_dict': load_file(path)}
            return content | _description(path)
        with warnings.catch_warnings():
            # For files that are not checkpoints, PyTorch warns in addition to the error.
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged bytes are interpreted as opcodes of pickle, which may raise anything.
        raise CheckpointError(f'{path}: {_why_unreadable(path, error)}') from error


def released() -> list[str]:
    """List the names of the weights that come with the package, usable in place of a file.

    Returns:
        Names, e.g. 'eurosat-rgb-nano'.
    """
    return sorted(path.parent.name for path in RELEASES.glob(f'*/{HUB_WEIGHTS}'))


def _why_unreadable(path: Path, error: Exception) -> str:
    advice = 'Give a .ckpt that `geofm fit` wrote, or a file of weights (.pth, .safetensors)'
    # For a truncated file, PyTorch seeks to an invalid position.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f'cannot be read: {error.strerror or error}'
    if path.is_file() and not path.stat().st_size:
        return f'an empty file. {advice}'
    if found := _CLASS.search(str(error)):
        return (
            f'holds more than weights ({found[1]}); objects in a file are never created. {advice}'
        )
    return f'not a readable PyTorch checkpoint, or damaged or truncated. {advice}'


def _is_safetensors(path: Path) -> bool:
    # The first 8 bytes are the length of the header, which is a JSON object.
    with path.open('rb') as file:
        return file.read(9)[8:] == b'{'


def _description(path: Path) -> dict[str, Any]:
    """Read geofm's description from the metadata of a safetensors file."""
    with safe_open(path, framework='pt') as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: damaged: its metadata '{METADATA}' are not a JSON object")
    return {METADATA: said}


def write_torch(content: Any, path: Path) -> Path:
    """Write a file with ``torch.save``.

    Args:
        content: Object to write.
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
    """Write tensors by name, in the format of the file's suffix.

    Args:
        tensors: Tensors by name.
        path: The file: ``.safetensors``, or one of :data:`TORCH_SUFFIXES`.
        said: Description for the metadata of safetensors: JSON values.

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
        metadata: Metadata of the file.

    Returns:
        The file.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        with atomic_file(path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, dict(metadata))
    except SafetensorError as error:
        # The partial file has been removed, so only the message shows a full disk.
        raise OSError(f'{path}: {error}') from error
    return path


def check_suffix(path: Path) -> None:
    """Check that a file has the suffix of a supported format.

    Args:
        path: The file.

    Raises:
        ValueError: If it has another suffix.
    """
    if path.suffix not in (*TORCH_SUFFIXES, '.safetensors'):
        raise ValueError(
            f'{path}: the suffix must be .safetensors, or one of {", ".join(TORCH_SUFFIXES)} for '
            'PyTorch'
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, types, shapes and values of tensors.

    Args:
        tensors: Tensors by name, in any order.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
