"""Several dates of one place as one sample."""

from pathlib import Path
from typing import Any, SupportsIndex

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import torch
from rasterio.windows import Window
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.pairs.dataset import MOST_SKIPPED, MatchedDataset
from geofm.datasets.pairs.reading import BrokenFileError

#: Entries of a sample that have one value per date.
DATED = ('image', 'valid', 'dates')


class MultiDate(Dataset[Sample]):
    """k dates of each place, so that the season acts as an augmentation.

    A sample is a place and not a match, so an epoch shows each place once, at k of its dates. The
    dates are drawn from PyTorch's global generator without replacement, in random order. If a place
    has fewer than k dates, all are used and then repeated. All dates of a sample share one grid: if
    the files of a place are on several grids, each grid counts as a separate place.

    Attributes:
        dataset: Dataset with one or more matches per place.
        n_dates: Number of dates in a sample.
    """

    def __init__(self, dataset: MatchedDataset, n_dates: int) -> None:
        """Initialize a new MultiDate instance.

        Args:
            dataset: Dataset with one or more matches per place.
            n_dates: Number of dates in a sample, k.

        Raises:
            ValueError: If *n_dates* is below 1.
        """
        if n_dates < 1:
            raise ValueError(f'n_dates must be at least 1, got {n_dates}')
        self.dataset = dataset
        self.n_dates = n_dates
        numbers = dataset.matches.places()
        # Pairs are grouped by place: place i has the pairs order[starts[i]:starts[i + 1]].
        order = np.argsort(numbers, kind='stable')
        self._order = SharedArray(order.astype(np.int32))
        starts = np.searchsorted(numbers[order], np.arange(numbers.max() + 2))
        self._starts = SharedArray(starts.astype(np.int32))

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self._starts.array) - 1

    @property
    def index(self) -> gpd.GeoDataFrame:
        """Table with one row per place: that of its first pair."""
        return self.dataset.index.iloc[self._order.array[self._starts.array[:-1]]]

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Return the size of a place.

        Args:
            index: Index of the place.

        Returns:
            Height and width in pixels.
        """
        return self.dataset.shape_of(int(self._pairs(index)[0]))

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Return the files of a place at all its dates.

        Args:
            index: Index of the place, 'index' of a sample.

        Returns:
            The files. Those of one sample are the files of its 'pairs' in :attr:`dataset`.

        Raises:
            IndexError: If there is no such place.
        """
        return [path for pair in self._pairs(index) for path in self.dataset.files_of(pair)]

    def __getitem__(self, index: int) -> Sample:
        """Read k dates of a whole place.

        Args:
            index: Index of the place.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            IndexError: If there is no such place.
        """
        return self.read_pair(index)

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read k dates of a place, or of a window of it.

        Args:
            position: Index of the place.
            window: Window of the patch, in whole pixels. Default: the whole patch.

        Returns:
            A sample like that of :meth:`geofm.datasets.SEN12MSCRTS.read_pair`, except for

            * image: float32 (k, C, H, W)
            * valid: bool (k, H, W)
            * dates: int64 (k, S)
            * index: int64 (), index of the place
            * pairs: int64 (k,), indices of the matches

        Raises:
            IndexError: If there is no such place.
            ValueError: If the window is not inside the patch, or a file cannot be read.
        """
        for _ in range(MOST_SKIPPED if self.dataset.on_error == 'skip' else 0):
            try:
                return self._read(position, window)
            except BrokenFileError as err:
                # All dates of a sample show one place, so the whole place is replaced, not one
                # date.
                self.dataset.note_failure(err)
                position = self._another(position)
        return self._read(position, window)

    def _read(self, position: int, window: Window | None) -> Sample:
        """Read dates of this place, without replacing it on failure."""
        pairs = self._pairs(position)
        order = pairs[torch.randperm(len(pairs)).numpy()]
        chosen = np.resize(order, self.n_dates)
        samples = [self.dataset.read_or_raise(int(pair), window) for pair in chosen]
        stacked = {key: torch.stack([sample[key] for sample in samples]) for key in DATED}
        numbers = {
            'index': torch.tensor(int(position)),
            'pairs': torch.stack([sample['index'] for sample in samples]),
        }
        return {**samples[0], **stacked, **numbers}

    def _pairs(self, index: SupportsIndex) -> npt.NDArray[np.int32]:
        """Return the indices of the pairs of a place."""
        position = index.__index__()
        if not 0 <= position < len(self):
            raise IndexError(f'place {position} of {len(self)}: out of range')
        return self._order.array[slice(*self._starts.array[position : position + 2])]

    def _another(self, position: int) -> int:
        """Draw another place of the same size at random."""
        sizes = self.dataset.matches.sizes(self._order.array[self._starts.array[:-1]])
        like = (sizes == sizes[position]).all(axis=1)
        places = np.flatnonzero(like)
        return int(places[int(torch.randint(len(places), ()))])

    def plot(self, sample: Sample, *args: Any, **kwargs: Any) -> Any:
        """Draw the first date of a sample.

        Args:
            sample: A sample of this dataset, in raw units.
            *args: Arguments of the plot method of :attr:`dataset`.
            **kwargs: Keyword arguments of that method.

        Returns:
            The figure.
        """
        first = {key: sample[key][0] for key in DATED if key in sample}
        return self.dataset.plot({**sample, **first}, *args, **kwargs)
