"""Files of weights: told apart by their content, written beside and renamed."""

import errno
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

#: Where safetensors' metadata hold what this project says of a file, as JSON.
METADATA = 'geofm'

#: Name of the weights in a folder of timm's hub format.
HUB_WEIGHTS = 'model.safetensors'

#: Weights that come with the package: a folder in timm's hub format for each name.
RELEASES = Path(__file__).parents[2] / 'releases'

#: Suffixes of the files that ``torch.save`` writes.
TORCH_SUFFIXES = ('.pth', '.pt', '.ckpt')

#: How PyTorch says that a file holds an object of a class.
_CLASS = re.compile(r'(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]{1,80})')


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be used here."""


def read_file(path: Path) -> Any:
    """Read a file of weights, whatever its name.

    Args:
        path: The file, as ``torch.save`` or safetensors writes them; or a folder in timm's hub
            format, whose ``model.safetensors`` is read; or a sharded checkpoint; or the name of
            weights that come with the package, see :func:`released`.

    Returns:
        What ``torch.save`` was given; of a sharded checkpoint, all but the state of optimizers; of
        safetensors, a dictionary with the tensors under ``state_dict`` and, if this project wrote
        it, what it said of them under :data:`METADATA`.

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
            return content | _said(path)
        with warnings.catch_warnings():
            # Of files that are no checkpoints PyTorch says more than the error does.
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged bytes are run as pickle's opcodes, which may raise anything.
        raise CheckpointError(f'{path}: {_why_unreadable(path, error)}') from error


def released() -> list[str]:
    """Names of the weights that come with the package, which stand for a file of weights.

    Returns:
        Names, e.g. 'eurosat-rgb-nano'.
    """
    return sorted(path.parent.name for path in RELEASES.glob(f'*/{HUB_WEIGHTS}'))


def _why_unreadable(path: Path, error: Exception) -> str:
    advice = 'Give a .ckpt that `geofm fit` wrote, or a file of weights (.pth, .safetensors)'
    # PyTorch seeks beyond the end of a file that is cut off.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f'cannot be read: {error.strerror or error}'
    if path.is_file() and not path.stat().st_size:
        return f'an empty file. {advice}'
    if found := _CLASS.search(str(error)):
        return (
            f'holds more than weights ({found[1]}), and objects out of a file are never created. '
            f'{advice}'
        )
    return f'not a readable PyTorch checkpoint, or it is damaged or cut off. {advice}'


def _is_safetensors(path: Path) -> bool:
    # The length of the header in 8 bytes, then a JSON object.
    with path.open('rb') as file:
        return file.read(9)[8:] == b'{'


def _said(path: Path) -> dict[str, Any]:
    """What this project said of the weights in a file of safetensors."""
    with safe_open(path, framework='pt') as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: its metadata '{METADATA}' are not a JSON object: damaged")
    return {METADATA: said}


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
