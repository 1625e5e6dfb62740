"""Sharded checkpoints: folders in which each rank has written its shards to a file.

Lightning's ``ModelParallelStrategy`` writes them with ``torch.distributed.checkpoint``. That module
unpickles the index and all values other than tensors, so a malicious checkpoint can run code. Here
the index may only contain objects of the classes that PyTorch itself writes into an index, other
values must be plain, and no file outside of the folder is read.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, override

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

#: Files of a sharded checkpoint: its index; and all but the weights and the optimisers' state.
SHARDS_INDEX, SHARDS_REST = '.metadata', 'meta.pt'

#: Classes and functions that an index may contain, by module.
_PARTS = {
    'torch.distributed.checkpoint.metadata': {
        'BytesStorageMetadata',
        'ChunkStorageMetadata',
        'Metadata',
        'MetadataIndex',
        'StorageMeta',
        'TensorProperties',
        'TensorStorageMetadata',
        '_MEM_FORMAT_ENCODING',
    },
    'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
    'torch.serialization': {'_get_layout'},
    'collections': {'OrderedDict'},
    'pathlib': {'PosixPath', 'WindowsPath'},
    'pathlib._local': {'PosixPath', 'WindowsPath'},
    'torch': {
        'Size',
        *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    },
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler for the classes of an index only."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if name in _PARTS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}')


class _Reader(FileSystemReader):
    """Reader of the files in a folder, with a checked index."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / SHARDS_INDEX).open('rb') as file:
            self.index: Metadata = _IndexUnpickler(file).load()
        for info in self.index.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError('its index names a file outside of the folder')

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class _Planner(DefaultLoadPlanner):
    """Planner that loads values other than tensors with ``weights_only``."""

    @override
    def load_bytes(self, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _WholePlanner(_Planner, _EmptyStateDictLoadPlanner):
    """Planner that loads whole tensors on one process."""


def is_sharded(path: Path) -> bool:
    """Return whether a path is a sharded checkpoint of the strategy ``fsdp2``.

    Args:
        path: A path.

    Returns:
        True if it is a folder with the files of a sharded checkpoint.
    """
    return all((path / name).is_file() for name in (SHARDS_INDEX, SHARDS_REST))


def read_rest(folder: Path) -> dict[str, Any]:
    """Read a sharded checkpoint without its weights and the state of optimizers.

    Args:
        folder: A sharded checkpoint.

    Returns:
        Values by name.
    """
    content: dict[str, Any] = torch.load(
        folder / SHARDS_REST, map_location='cpu', weights_only=True
    )
    return content


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Load the shards of each rank. All ranks must call this.

    Args:
        state: ``state_dict``, ``optimizer_0`` and so on; tensors are loaded in place. The number of
            ranks may differ from that of the checkpoint.
        folder: A sharded checkpoint.

    Raises:
        UnpicklingError: If the checkpoint contains objects other than tensors and plain values.
        ValueError: If it cannot be read, or lacks an entry of *state*.
    """
    with _as_error(folder):
        _load_state_dict(state, storage_reader=_Reader(folder), planner=_Planner())


def read_sharded(folder: Path, optimizers: bool = False) -> dict[str, Any]:
    """Read a whole sharded checkpoint on one process.

    Args:
        folder: A sharded checkpoint.
        optimizers: Whether to read the state of optimisers as well.

    Returns:
        The content of the equivalent checkpoint in one file.

    Raises:
        UnpicklingError: If the checkpoint contains objects other than tensors and plain values.
        ValueError: If its shards cannot be read.
    """
    content = read_rest(folder)
    reader = _Reader(folder)
    names = {path[0] for path in reader.index.planner_data.values()}
    chosen = sorted(name for name in names if optimizers or name == 'state_dict')
    found: dict[str, Any] = {}
    with _as_error(folder):
        planner = _WholePlanner(keys=set(chosen))
        _load_state_dict(found, storage_reader=reader, planner=planner, no_dist=True)
    content['state_dict'] = found['state_dict']
    if optimizers:
        count = len(chosen) - 1
        content['optimizer_states'] = [_numbered(found[f'optimizer_{i}']) for i in range(count)]
    return content


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Convert the state of an optimiser from names of parameters to PyTorch's numbers."""
    names = [name for group in state['param_groups'] for name in group['params']]
    number = {name: i for i, name in enumerate(names)}
    return {
        'state': {number[name]: value for name, value in state['state'].items()},
        'param_groups': [
            {**group, 'params': [number[name] for name in group['params']]}
            for group in state['param_groups']
        ],
    }


@contextmanager
def _as_error(folder: Path) -> Iterator[None]:
    """Context that raises the error of the first rank that failed.

    PyTorch's own exception for failed ranks is not a subclass of ``Exception``.
    """
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        plain = not isinstance(failure, pickle.UnpicklingError)
        raise (ValueError if plain else pickle.UnpicklingError)(f'{folder}: {failure}') from error
