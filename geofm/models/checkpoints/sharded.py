"""Sharded checkpoints: folders in which each rank has written its shards to a file.

They are what Lightning's ``ModelParallelStrategy`` writes with ``torch.distributed.checkpoint``.
That module unpickles the index and every value that is no tensor, so whoever wrote a checkpoint may
run code. Here the index may hold nothing but what an index is made of, other values are plain, and
no file outside of the folder is read.
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

#: Files of a sharded checkpoint: its index; and all but the weights and the optimizers' state.
SHARDS_INDEX, SHARDS_REST = '.metadata', 'meta.pt'

#: What an index is made of, by module.
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
    """Creates what an index is made of, and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if name in _PARTS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {module}.{name}')


class _Reader(FileSystemReader):
    """Reads the files of a folder, by an index that has been looked at."""

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
    """Loads values that are no tensors as plain ones."""

    @override
    def load_bytes(self, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _WholePlanner(_Planner, _EmptyStateDictLoadPlanner):
    """Loads whole tensors on one process."""


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint, as the strategy ``fsdp2`` writes it.

    Args:
        path: A path.

    Returns:
        True if it is a folder with the files of a sharded checkpoint.
    """
    return all((path / name).is_file() for name in (SHARDS_INDEX, SHARDS_REST))


def read_rest(folder: Path) -> dict[str, Any]:
    """Read what is neither weights nor state of optimizers.

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
    """Load what each rank needs into its shards; all ranks take part.

    Args:
        state: ``state_dict``, and ``optimizer_0`` and so on; tensors are loaded in place. It need
            not be sharded over as many ranks as it was.
        folder: A sharded checkpoint.

    Raises:
        UnpicklingError: If it holds other objects.
        ValueError: If it cannot be read, or does not hold all of that state.
    """
    with _as_error(folder):
        _load_state_dict(state, storage_reader=_Reader(folder), planner=_Planner())


def read_sharded(folder: Path, optimizers: bool = False) -> dict[str, Any]:
    """Read a sharded checkpoint on one process, as if it had been written by one.

    Args:
        folder: A sharded checkpoint.
        optimizers: Whether to read the state of optimizers, too.

    Returns:
        What Lightning would have written to one file.

    Raises:
        UnpicklingError: If it holds other objects.
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
    """State of an optimizer by the numbers of parameters, as PyTorch has it, not by their names."""
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
    """Raise what the first rank that failed says: PyTorch's exception is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        plain = not isinstance(failure, pickle.UnpicklingError)
        raise (ValueError if plain else pickle.UnpicklingError)(f'{folder}: {failure}') from error
