"""Find the files that a sample is read from, for any data set that lists them."""

import os
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

#: Attributes in which data sets of TorchGeo and torchvision list the files of each sample.
_LISTS = ('files', 'samples', 'imgs')


def files_of(dataset: Any, index: int) -> list[Path]:
    """Find the files that a sample is read from.

    Args:
        dataset: A data set of geofm, a subset, or a data set that lists one or more paths per
            sample, as many of TorchGeo and torchvision do.
        index: Index of the sample.

    Returns:
        The files; an empty list if the data set does not list them.

    Raises:
        IndexError: If there is no such sample.
    """
    if hasattr(dataset, 'files_of'):
        return list(dataset.files_of(index))
    if isinstance(dataset, Subset):
        return files_of(dataset.dataset, dataset.indices[index])
    for name in _LISTS:
        # vars() skips the property of a GeoDataset, whose files are not listed by sample.
        listed = vars(dataset).get(name)
        if isinstance(listed, list) and isinstance(dataset, Sized) and len(listed) == len(dataset):
            return [Path(path) for path in _paths(listed[index])]
    return []


def _paths(entry: Any) -> Iterable[str | os.PathLike[str]]:
    """Return the paths in an entry of such a list."""
    if isinstance(entry, str | os.PathLike):
        return [entry]
    parts = entry.values() if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping | list | tuple):
        return []
    return [path for part in parts for path in _paths(part)]
