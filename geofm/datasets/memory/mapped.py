"""Arrays that are stored in a folder and memory-mapped by all processes of a machine."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geofm.atomic import atomic_folder
from geofm.datasets.memory.path_list import PathList
from geofm.datasets.memory.release import release_memory
from geofm.locking import locked_name
from geofm.printing import warn

#: Values by name: arrays, lists of paths, tuples, mappings, strings, numbers and None.
type Values = Mapping[str, Any]

#: File of all values that are not arrays.
_PLAIN = 'values.json'

# Keys that mark an array or a list of paths.
_ARRAY, _PATHS = '.array', '.paths'


def mapped(folder: Path, make: Callable[[], Values]) -> Values:
    """Map values from a folder.

    The first process that calls this creates the values while the others wait.

    Args:
        folder: The folder. Its name must identify its content.
        make: Function that creates the values.

    Returns:
        The values. Their arrays are read-only and in the page cache once for all processes. If the
        folder cannot be written, the created values themselves are returned.

    Raises:
        Exception: Any error of *make*. Nothing is stored then.
    """
    if folder.exists():
        return _read(folder)
    if not os.access(folder.parent, os.W_OK):
        _warn(folder, 'no permission')
        return make()
    with locked_name(folder, wait=True):
        if not folder.exists():
            values = make()
            if not _stored(folder, values):
                return values
            del values
            release_memory()
    return _read(folder)


def _stored(folder: Path, values: Values) -> bool:
    """Write values to a folder, and return whether that was possible."""
    try:
        with atomic_folder(folder) as part:
            arrays: list[np.ndarray] = []
            plain = _encoded(values, arrays)
            for i, array in enumerate(arrays):
                np.save(part / f'{i}.npy', array, allow_pickle=False)
            (part / _PLAIN).write_text(json.dumps(plain))
    except OSError as error:
        _warn(folder, error)
        return False
    return True


def _warn(folder: Path, why: object) -> None:
    warn(
        f'{folder}: cannot be written, so each process keeps its own copy ({why}); put '
        'the table in a writable folder',
    )


def _read(folder: Path) -> Values:
    """Map the values of a folder."""
    found: Values = _decoded(json.loads((folder / _PLAIN).read_text()), folder)
    return found


def _encoded(value: Any, arrays: list[Any]) -> Any:
    """Convert a value to JSON types, and append its arrays to a list."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, PathList):
        return {_PATHS: _encoded(value.parts, arrays)}
    if isinstance(value, Mapping):
        return {key: _encoded(entry, arrays) for key, entry in value.items()}
    return [_encoded(v, arrays) for v in value] if isinstance(value, tuple) else value


def _decoded(value: Any, folder: Path) -> Any:
    """Restore a value from JSON types."""
    if isinstance(value, list):
        return tuple(_decoded(entry, folder) for entry in value)
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        array = np.load(folder / f'{int(value[_ARRAY])}.npy', mmap_mode='r', allow_pickle=False)
        return array.view(np.ndarray)
    if _PATHS in value:
        return PathList.of_parts(*_decoded(value[_PATHS], folder))
    return {key: _decoded(entry, folder) for key, entry in value.items()}
