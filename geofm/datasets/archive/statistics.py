"""Band statistics of a table of rasters, per sensor."""

import os
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np
import torch
from rasterio.windows import Window
from torch.utils.data import DataLoader, Dataset
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.archive.dataset import RasterArchive
from geofm.datasets.pairs.dataset import EmptySplitError
from geofm.datasets.seeded import Seeded
from geofm.datasets.splitting import Split, SplitRule
from geofm.datasets.statistics import dataset_statistics
from geofm.datasets.table import RasterTable, open_table, read_observation

#: Side of the parts in which scenes are read in pixels.
_SIDE = 1024

#: Function that shows the progress of a loop, given the iterable, a description and the length.
type Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


class ScenesInParts(Dataset[Sample]):
    """All pixels of the observations of a sensor, in parts that fit into memory."""

    def __init__(self, archive: RasterArchive) -> None:
        """Initialize a new ScenesInParts instance.

        Args:
            archive: Dataset of one sensor, without windows.
        """
        self.archive = archive
        (self.sensor,) = archive.sensors
        self.parts: list[tuple[int, Window]] = []
        for position, (height, width) in enumerate(archive.matches.sizes(slice(None)).tolist()):
            starts = product(range(0, height, _SIDE), range(0, width, _SIDE))
            self.parts += [
                (position, Window(col, row, min(_SIDE, width - col), min(_SIDE, height - row)))
                for row, col in starts
            ]

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.parts)

    def __getitem__(self, index: Any) -> Sample:
        """Read a part.

        Args:
            index: Index of the part.

        Returns:
            The part with 'image' float32 (C, H, W) and 'valid' bool (H, W).
        """
        position, window = self.parts[index]
        rows = self.archive.matches.rows_of(position, self.sensor)
        assert rows is not None
        values, valid = read_observation(
            self.archive.table, rows, self.archive.bands, window=window
        )
        return {'image': torch.from_numpy(values), 'valid': torch.from_numpy(valid)}


def table_statistics(
    table: RasterTable | Path,
    split: Split = 'train',
    split_by: SplitRule | None = None,
    num_workers: int = 0,
    track: Track | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Compute statistics of all bands of a table over the valid pixels of each sensor.

    Sensors are not matched, and each is read on its own grid. If the bands of an observation are in
    several files, they are read on the finest of their grids.

    Args:
        table: A table of rasters, or its file.
        split: The split to read.
        split_by: Rule by which samples are split. Default: by the column 'split' of the table.
        num_workers: Number of processes that read.
        track: Function that shows the progress.

    Returns:
        For each band, ``unit``, ``mean``, ``std`` and ``percentiles``, see
        :meth:`geofm.datasets.BandStatistics.result`; and the number of observations of
        each sensor.

    Raises:
        EmptySplitError: If no sensor has an observation in the split. It is a ValueError.
        TableError: If the table cannot be used. It is a ValueError.
        ValueError: If a sensor has no valid pixel, or a file cannot be read.
    """
    opened = open_table(table if isinstance(table, RasterTable) else os.fspath(table))
    bands: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    empty: EmptySplitError | None = None
    codes = np.unique(opened.sensor)
    for key in (opened.sensors[code] for code in codes.tolist()):
        try:
            archive = RasterArchive(opened, [key], split=split, split_by=split_by)
        except EmptySplitError as error:
            empty = error
            continue
        parts = ScenesInParts(archive)
        # Seeded passes user-defined sensors to spawned processes.
        loader: Iterable[Any] = DataLoader(Seeded(parts), batch_size=None, num_workers=num_workers)
        if track is not None:
            loader = track(loader, f'Reading {key}', len(parts))
        bands |= dataset_statistics(loader, archive.bands, f'{opened.source}: {key}')
        counts[key] = len(archive)
    if not bands and empty is not None:
        raise empty
    return bands, counts
