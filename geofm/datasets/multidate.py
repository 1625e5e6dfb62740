"""Several dates of one place as one sample."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rasterio.windows import Window
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.grid import ALIGNMENT_TOLERANCE

#: Columns of an index of pairs that say what ground a pair shows.
PLACE = ['season', 'roi', 'patch']

#: Entries of a sample that differ between dates.
DATED = ('image', 'valid', 'dates')


class MultiDate(Dataset[Sample]):
    """k dates of each patch of SEN12MS-CR-TS: season as an augmentation.

    A sample is a place and not a pair, so an epoch sees each place once, at k of its dates. These
    are drawn at random from PyTorch's generator, in random order and none twice; of a place
    with fewer than k dates, all are taken and repeated. All dates of a place lie on one grid:
    should the files of a patch lie on several, each of these is a place of its own.

    Attributes:
        index: One row a place: the first of its pairs in the index of the pairs.
    """

    def __init__(self, dataset: SEN12MSCRTS, n_dates: int) -> None:
        """Initialize a new MultiDate instance.

        Args:
            dataset: The pairs.
            n_dates: Number of dates in a sample, k.

        Raises:
            ValueError: If *n_dates* is below 1.
        """
        if n_dates < 1:
            raise ValueError(f'n_dates must be at least 1, got {n_dates}')
        self.dataset = dataset
        self.n_dates = n_dates
        numbers = _places(dataset.index)
        # Pairs of a place side by side: place i has pairs order[starts[i]:starts[i + 1]]. Arrays
        # and no lists, so that workers need no copy of them.
        self._order = np.argsort(numbers, kind='stable')
        self._starts = np.searchsorted(numbers[self._order], np.arange(numbers.max() + 2))
        self.index = dataset.index.iloc[self._order[self._starts[:-1]]]

    def __len__(self) -> int:
        """Number of places."""
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        """Read k dates of a place, whole.

        Args:
            index: Number of the place.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            IndexError: If there is no such place.
        """
        return self.read_pair(index)

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read k dates of a place, or of a window of it.

        Args:
            position: Number of the place.
            window: Window of the patch, in whole pixels; all of it by default.

        Returns:
            A sample as of :meth:`geofm.datasets.SEN12MSCRTS.read_pair`, but for

            * image: float32 (k, C, H, W)
            * valid: bool (k, H, W)
            * dates: int64 (k, 2)

        Raises:
            IndexError: If there is no such place.
            ValueError: If the window is not inside the patch, or a file cannot be read.
        """
        if not 0 <= position < len(self):
            raise IndexError(f'place {position} of {len(self)}: out of range')
        pairs = self._order[self._starts[position] : self._starts[position + 1]]
        order = pairs[torch.randperm(len(pairs)).numpy()]
        chosen = np.resize(order, self.n_dates)
        samples = [self.dataset.read_pair(int(pair), window) for pair in chosen]
        stacked = {key: torch.stack([sample[key] for sample in samples]) for key in DATED}
        return {**samples[0], **stacked}

    def plot(self, sample: Sample, *args: Any, **kwargs: Any) -> Any:
        """Draw the first date of a sample.

        Args:
            sample: A sample of this dataset, in raw units.
            *args: Arguments passed to the plot method of the pairs.
            **kwargs: Keyword arguments passed to it.

        Returns:
            The figure.
        """
        first = {key: sample[key][0] for key in DATED if key in sample}
        return self.dataset.plot({**sample, **first}, *args, **kwargs)


def _places(index: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of the place of each pair, from 0, in the order in which places first occur."""
    transforms = np.array(index['transform'].tolist(), dtype=float).reshape(len(index), 6)
    patch = index.groupby(PLACE, sort=False).ngroup().to_numpy()
    first = np.unique(patch, return_index=True)[1][patch]
    pixel = np.abs(transforms[first][:, [0, 0, 0, 4, 4, 4]])
    # Files of one grid differ by rounding alone: by less than the tolerance from the first one.
    off = (transforms - transforms[first]) / pixel
    keys = pd.DataFrame(np.round(off / ALIGNMENT_TOLERANCE / 2).astype(np.int64))
    keys['patch'] = patch
    for column in ('epsg', 'height', 'width'):
        keys[column] = index[column].to_numpy()
    numbers = keys.groupby(list(keys.columns), sort=False).ngroup()
    return np.asarray(numbers, dtype=np.int64)
