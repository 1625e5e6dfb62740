"""Statistics of each band over a dataset, in one pass and with little memory."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from geofm.atomic import write_atomically
from geofm.sensors import BandError, check_bands, sensor_of
from geofm.units import UnitWatch

#: Percentiles that are computed.
PERCENTILES = (1, 2, 5, 25, 50, 75, 95, 98, 99)


class BandStatistics:
    """Running mean, standard deviation and percentiles of bands.

    Moments are merged by the algorithm of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979, which is numerically stable, unlike sums of
    squares.

    Attributes:
        bands: Names of the bands.
        pixels: Number of valid pixels so far.
    """

    def __init__(self, bands: Sequence[str]) -> None:
        """Initialize a new BandStatistics instance.

        Args:
            bands: Names of the bands, in the order of the channels.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        self.bands = check_bands(bands)
        self.pixels = 0
        self._mean = np.zeros(len(self.bands))
        self._squares = np.zeros(len(self.bands))
        self._bins = [sensor_of(band).histogram for band in self.bands]
        self._counts = [np.zeros(bins.bins, np.int64) for bins in self._bins]

    def update(self, image: Tensor, valid: Tensor) -> None:
        """Add a sample.

        Args:
            image: Raw values, shape (C, H, W).
            valid: Mask of valid pixels, bool (H, W).
        """
        values = image[:, valid].double().numpy()
        count = values.shape[1]
        if not count:
            return
        mean = values.mean(axis=1)
        total = self.pixels + count
        step = mean - self._mean
        self._squares += ((values - mean[:, None]) ** 2).sum(axis=1)
        self._squares += step**2 * (self.pixels * count / total)
        self._mean += step * (count / total)
        self.pixels = total
        for band, histogram, counts in zip(values, self._bins, self._counts, strict=True):
            positions = np.round((band - histogram.first) / histogram.width)
            bins = np.clip(positions, 0, histogram.bins - 1).astype(np.int64)
            counts += np.bincount(bins, minlength=histogram.bins)

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the statistics.

        Returns:
            For each band, ``unit``, ``mean``, ``std`` and ``percentiles`` (a dict from percentage
            to value).

        Raises:
            ValueError: If there is no valid pixel.
        """
        if not self.pixels:
            raise ValueError('no valid pixel: statistics cannot be computed')
        std = np.sqrt(self._squares / self.pixels)
        return {
            band: {
                'unit': sensor_of(band).unit,
                'mean': float(self._mean[i]),
                'std': float(std[i]),
                'percentiles': self._percentiles(i),
            }
            for i, band in enumerate(self.bands)
        }

    def _percentiles(self, i: int) -> dict[int, float]:
        """Return the smallest values that are not exceeded by so many percent of the pixels."""
        first, width = self._bins[i].first, self._bins[i].width
        shares: npt.NDArray[np.float64] = self._counts[i].cumsum() / self.pixels
        return {
            p: round(float(first + width * np.searchsorted(shares, p / 100 * (1 - 1e-12))), 6)
            for p in PERCENTILES
        }


def dataset_statistics(
    samples: Iterable[Mapping[str, Tensor]], bands: Sequence[str], source: str = 'data set'
) -> dict[str, dict[str, Any]]:
    """Compute statistics of the valid pixels of samples.

    Args:
        samples: Samples with 'image' (C, H, W) and 'valid' (H, W), as returned by
            :meth:`geofm.datasets.SEN12MSCRTS.read_pair`.
        bands: Names of the channels.
        source: Name of the data set, for a warning if its values seem to be in another unit.

    Returns:
        See :meth:`BandStatistics.result`.

    Raises:
        ValueError: If there is no valid pixel, or a file cannot be read.
    """
    statistics, watch = BandStatistics(bands), UnitWatch(bands, source)
    for sample in samples:
        watch.look(sample['image'].numpy())
        statistics.update(sample['image'], sample['valid'])
    return statistics.result()


def write_statistics(
    file: Path, bands: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write statistics as YAML.

    Args:
        file: File to write.
        bands: See :meth:`BandStatistics.result`.
        about: Description of the data, written before the statistics.
    """
    content = {**about, 'bands': {name: dict(values) for name, values in bands.items()}}
    write_atomically(file, yaml.safe_dump(content, sort_keys=False))


def read_statistics(file: str | os.PathLike[str], bands: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Read mean and standard deviation of bands from a file.

    Args:
        file: YAML file written by ``geofm stats``.
        bands: Names of the bands to return, in this order.

    Returns:
        Mean and standard deviation, float32 tensors of shape (C,).

    Raises:
        BandError: If the file lacks a band.
        ValueError: If the file cannot be read as statistics.
    """
    try:
        known = yaml.safe_load(Path(file).read_text())['bands']
        missing = [band for band in bands if band not in known]
        if missing:
            raise BandError(f'{file}: statistics of the bands {missing} are missing')
        mean, std = (
            torch.tensor([float(known[band][name]) for band in bands]) for name in ('mean', 'std')
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError) as err:
        raise ValueError(
            f"{file}: cannot be read as statistics ({err}); 'geofm stats' writes them"
        ) from err
    return mean, std
