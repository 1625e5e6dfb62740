"""Which files are behind a sample, for any data set that can tell."""

import os
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

#: Attributes in which TorchGeo's and torchvision's data sets list a sample's files, by number.
_LISTS = ('files', 'samples', 'imgs')


def files_of(dataset: Any, index: int) -> list[Path]:
    """Find the files behind a sample.

    Args:
        dataset: A data set: one of this project's, a subset, or one that lists its files, a path
            or several for each of its samples, as many of TorchGeo's and torchvision's do.
        index: Number of the sample.

    Returns:
        The files; none if the data set does not tell.

    Raises:
        IndexError: If there is no such sample.
    """
    if hasattr(dataset, 'files_of'):
        return list(dataset.files_of(index))
    if isinstance(dataset, Subset):
        return files_of(dataset.dataset, dataset.indices[index])
    for name in _LISTS:
        # Files of a GeoDataset are not by sample; as a property they are listed anew each time.
        listed = vars(dataset).get(name)
        if isinstance(listed, list) and isinstance(dataset, Sized) and len(listed) == len(dataset):
            return [Path(path) for path in _paths(listed[index])]
    return []


def _paths(entry: Any) -> Iterable[str | os.PathLike[str]]:
    """Paths among what a data set notes of a sample."""
    if isinstance(entry, str | os.PathLike):
        return [entry]
    parts = entry.values() if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping | list | tuple):
        return []
    return [path for part in parts for path in _paths(part)]
