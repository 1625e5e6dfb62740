"""Hashes by which features are found again: of weights, data and code."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import geofm
from geofm.sensors import added_sensors

#: Code whose change may change features, in the folder of the package.
_CODE = (
    'sensors',
    'datasets/named_bands.py',
    'transforms/normalize.py',
    'transforms/picture.py',
    'transforms/statistics.py',
    'models',
    'evaluation/naming.py',
    'evaluation/sources.py',
    'evaluation/adapter.py',
    'evaluation/encoders.py',
    'evaluation/features.py',
)

#: Libraries whose change may change features.
_LIBRARIES = ('torch', 'timm', 'torchgeo', 'rasterio')


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, types, shapes and values of tensors.

    Args:
        tensors: Tensors by name, in an order that does not count.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_module(module: nn.Module) -> str:
    """Hash of a module: what it is made of, its parameters and all of its buffers.

    Args:
        module: The module.

    Returns:
        SHA-256 in hexadecimal.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return hashlib.sha256(f'{module!r}\n{hash_tensors(tensors)}'.encode()).hexdigest()


def code_version() -> str:
    """Hash of the code, the libraries and the user's sensors that features depend on.

    Returns:
        SHA-256 in hexadecimal.
    """
    added = ' '.join(map(repr, added_sensors()))
    return hashlib.sha256(f'{_code_version()} {added}'.encode()).hexdigest()


@cache
def _code_version() -> str:
    root = Path(inspect.getfile(geofm)).parent
    digest = hashlib.sha256(' '.join(f'{name} {version(name)}' for name in _LIBRARIES).encode())
    for part in _CODE:
        path = root / part
        for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
            digest.update(f'{file.relative_to(root)}\n'.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def identity(dataset: Dataset[Any]) -> str:
    """What a data set is: its class, the plain values among its attributes, the sets that it wraps.

    Args:
        dataset: The data set.

    Returns:
        A text that another data set is not likely to have.
    """
    return json.dumps(_plain(dataset), sort_keys=True)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; None where it says nothing of what the data are."""
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path | slice):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Dataset):
        cls = type(value)
        return {'': f'{cls.__module__}.{cls.__qualname__}', **_plain(vars(value))}
    return None
