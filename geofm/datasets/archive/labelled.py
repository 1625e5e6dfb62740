"""Samples of a table of rasters with labels of one's own."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.archive.dataset import Split
from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.archive.masked import IGNORE, TargetArchive
from geofm.datasets.labels import LabelError, LabelSource, open_labels
from geofm.datasets.labels.source import check_values
from geofm.datasets.pairs.dataset import EmptySplitError
from geofm.datasets.plot import plot_pair
from geofm.datasets.splitting import SplitRule
from geofm.datasets.table import RasterTable
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend
from geofm.sensors import sensor_of

#: What is to be told: the class or a number of each pixel, the classes that occur in a sample, or
#: the one that covers most of it.
Target = Literal['segmentation', 'regression', 'multilabel', 'majority']

#: What a configuration says of a class map: how many classes, their names, or name to value.
type Classes = int | Sequence[str] | Mapping[str, Any]

type _Labels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


class LabelledArchive(TargetArchive):
    """Samples of a table of rasters with labels of one's own.

    Labels are read on the grid of each sample, from a file of polygons, points or pixels, or from a
    band of the table. Samples without any label are left out, and counted in :attr:`skipped`.

    Attributes:
        target: What is to be told.
        ignore_index: Value of 'mask' where there is no label.
        counts: How often each output occurs, int64 (L,): pixels of 'segmentation', samples of
            'multilabel' and 'majority'; empty for 'regression'.
        skipped: Number of samples left out.
    """

    def __init__(
        self,
        table: RasterTable | Path,
        sensors: Sequence[str],
        labels: str | Mapping[str, Any],
        classes: Classes | None = None,
        target: Target = 'segmentation',
        ignore_index: int = IGNORE,
        min_labelled: float = 0.0,
        bands: Sequence[str] | None = None,
        split: Split = 'train',
        split_by: SplitRule | Mapping[str, Any] | None = None,
        reference: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new LabelledArchive instance.

        Args:
            table: A table of rasters, or its file.
            sensors: Keys of the sensors of 'image'.
            labels: Arguments of :func:`geofm.datasets.labels.open_labels`, e.g.
                ``{'path': 'labels.gpkg', 'column': 'class'}``; or a band of the table, e.g.
                ``'landcover.class'``.
            classes: The classes, as for :meth:`geofm.legend.Legend.of`; by default those of the
                file. Labels in a band of the table need them.
            target: 'segmentation' or 'regression': 'mask' (H, W); 'multilabel' or 'majority':
                'label', one of a whole sample.
            ignore_index: Value of 'mask' where there is no label, of 'segmentation'.
            min_labelled: Samples are left out of which less than this fraction, 0 to 1, is
                labelled; at least one pixel always must be.
            bands: Names of the channels of 'image'; by default all of the sensors.
            split: One of 'train', 'val', 'test' or 'all'.
            split_by: How samples are split, as for :class:`~geofm.datasets.RasterArchive`.
            reference: The sensor that gives the grid; by default the reference of *sensors*.
            **kwargs: Further arguments of :class:`~geofm.datasets.RasterArchive`.

        Raises:
            BandError: If a band is unknown, or the labels are a band of 'image'.
            EmptySplitError: If no sample of the split has a label; a ValueError.
            LabelError: If the labels cannot be used; a ValueError.
            ValueError: As from :class:`~geofm.datasets.RasterArchive`, or if another argument is
                out of range, or *ignore_index* is the value of a class.
        """
        if target not in get_args(Target):
            raise ValueError(f"unknown target '{target}': choose from {list(get_args(Target))}")
        if not 0 <= min_labelled <= 1:
            raise ValueError(f'min_labelled must be a fraction of 0 to 1, not {min_labelled}')
        self.target: Target = target
        self.ignore_index = ignore_index
        self.min_labelled = min_labelled
        legend = None if classes is None else Legend.of(classes)
        self._source = _open(labels, legend)
        mask = labels if isinstance(labels, str) else None
        if mask is not None and legend is None and target != 'regression':
            raise LabelError(f"labels '{mask}': say which classes there are (classes)")
        super().__init__(table, sensors, mask, bands, split, split_by, reference, **kwargs)
        self._legend = legend
        self._check_ignored()
        self.skipped = LeftOut()
        self.counts = self._keep_labelled()

    @cached_property
    def legend(self) -> Legend | None:
        """The classes; None for 'regression'."""
        if self.target == 'regression':
            return None
        if self._legend is not None:
            return self._legend
        assert self._source is not None
        return self._source.legend

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each output of a network."""
        legend = self.legend
        return () if legend is None else tuple(legend.name(i) for i in range(legend.size))

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Number of the sample.

        Returns:
            As of :meth:`RasterArchive.read_pair`, and the target:

            * 'segmentation': 'mask' int64 (H, W), values of classes or :attr:`ignore_index`
            * 'regression': 'mask' float32 (H, W), NaN where there is no label
            * 'multilabel': 'label' int64 (L,), 1 for the classes that occur
            * 'majority': 'label' int64 (), the class of most labelled pixels

            Labels of pixels where a sensor has no data do not count in a 'mask', unless the sample
            has no others.
        """
        sample = self.read_image(index)
        sample.pop('target', None)
        # Where a broken file is skipped, this is the number of another sample.
        labels = self.labels_of(int(sample['index']))
        if self.target in ('multilabel', 'majority'):
            return {**sample, 'label': torch.from_numpy(self._label(labels))}
        known = _known(labels)
        seen = known & sample['valid'].numpy()
        known = seen if seen.any() else known
        if self.target == 'regression':
            return {**sample, 'mask': torch.from_numpy(np.where(known, labels, np.float32(np.nan)))}
        mask = np.where(known, labels.astype(np.int64), self.ignore_index)
        return {**sample, 'mask': torch.from_numpy(mask)}

    def labels_of(self, position: int) -> _Labels:
        """Labels of a sample, whether or not its sensors have data.

        Args:
            position: Number of the sample.

        Returns:
            Values of classes uint8 (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label;
            for 'regression' numbers float32 (H, W), NaN there.

        Raises:
            LabelError: If they cannot be read.
        """
        if self._source is None:
            return self._band_of(position)
        grid = self._grid_of(position)
        if self.target == 'regression':
            return self._source.numbers_on(grid)
        return self._source.classes_on(grid)

    def balanced_weights(self) -> Tensor:
        """Weights by which rare classes count as much as frequent ones.

        Returns:
            float32 (L,): samples (or pixels) / (classes * those of the class), as scikit-learn's
            'balanced'; 1 for outputs without a sample. For 'multilabel': samples without the class
            / those with it, as 'pos_weight' of PyTorch's BCEWithLogitsLoss.

        Raises:
            ValueError: If the target are no classes.
        """
        if self.target == 'regression':
            raise ValueError('class weights are for classes, not for regression')
        counts = torch.from_numpy(self.counts).double()
        occurs = counts > 0
        if self.target == 'multilabel':
            weights = (len(self) - counts) / counts
            # A class that is everywhere has no negatives, and would count for nothing.
            occurs &= counts < len(self)
        else:
            weights = counts.sum() / (occurs.sum() * counts)
        return torch.where(occurs, weights, 1.0).float()

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw a sample: its sensors, its mask in the colours of the classes, and a prediction.

        Args:
            sample: A sample of this data set, in raw units.
            show_titles: Whether to write a title above each panel.
            suptitle: Title of the figure.

        Returns:
            The figure.
        """
        sample = {key: value for key, value in sample.items() if key != 'label' or value.ndim == 0}
        colormap, legend = None, self.legend
        if 'mask' in sample:
            mask = sample['mask'].float()
            unknown = mask.isnan() | (mask == self.ignore_index) & (legend is not None)
            sample['mask'] = torch.where(unknown, -1.0, mask)
        if legend is not None:
            colors = [legend.colors.get(i, (128, 128, 128)) for i in range(legend.size)]
            colormap = ListedColormap(np.array(colors) / 255)
        return plot_pair(
            sample, self.bands, cmap=colormap, show_titles=show_titles, suptitle=suptitle
        )

    # -- labels ----------------------------------------------------------------------------------

    def _check_ignored(self) -> None:
        """Check that pixels without a label differ from those of every class."""
        if self.target == 'segmentation' and self.legend is not None:
            known = dict(zip(self.legend.values, self.legend.names, strict=True))
            if self.ignore_index in known:
                raise ValueError(
                    f'ignore_index {self.ignore_index} is the value of the class '
                    f"'{known[self.ignore_index]}': pixels without a label would be of that class; "
                    f'leave ignore_index at {IGNORE}, in the data and in the task'
                )

    def _keep_labelled(self) -> npt.NDArray[np.int64]:
        """Leave out samples without labels; how often each output occurs in the others."""
        samples = len(self)
        size = 0 if self.legend is None else self.legend.size
        kept = np.zeros(samples, bool)
        counts = np.zeros(size, np.int64)
        # Several dates of a place have the same labels.
        seen: dict[Any, tuple[bool, npt.NDArray[np.int64]]] = {}
        positions = range(samples)
        for i in track(positions, 'Reading labels') if samples > 500 else positions:
            key = i if self._source is None else self._place(i)
            if key not in seen:
                seen[key] = self._count(self.labels_of(i), size)
            kept[i], found = seen[key]
            if kept[i]:
                counts += found
        gone = np.flatnonzero(~kept)
        if len(gone):
            enough = f'labels on {self.min_labelled:.0%}' if self.min_labelled else 'a label'
            reason = f"of {samples} samples of split='{self.archive.split}' without {enough}"
            self.skipped.add(reason, len(gone), str(self.files_of(int(gone[0]))[0]))
        if not kept.any():
            raise EmptySplitError(
                f'{self.archive.table.source}: left out: {self.skipped}; none is left. Check that '
                'the labels lie on the scenes'
            )
        if len(gone):
            self.archive.matches = self.archive.matches.take(np.flatnonzero(kept))
            self.skipped.warn()
        return counts

    def _count(self, labels: _Labels, size: int) -> tuple[bool, npt.NDArray[np.int64]]:
        """Whether labels are enough, and how often each output occurs."""
        known = _known(labels)
        enough = bool(known.any() and known.mean() >= self.min_labelled)
        counts = np.zeros(size, np.int64)
        if not enough or self.target == 'regression':
            return enough, counts
        if self.target == 'segmentation':
            return enough, _pixels(labels, size)
        label = self._label(labels)
        if self.target == 'multilabel':
            return enough, label
        counts[int(label)] = 1
        return enough, counts

    def _label(self, labels: _Labels) -> npt.NDArray[np.int64]:
        """Label of a whole sample."""
        assert self.legend is not None
        pixels = _pixels(labels, self.legend.size)
        if self.target == 'multilabel':
            return (pixels > 0).astype(np.int64)
        return np.asarray(pixels.argmax(), np.int64)

    def _place(self, position: int) -> tuple[Any, ...]:
        """What samples of the same pixels have in common."""
        grid, epsg, extent = self.archive.matches.scene(position)
        return epsg, extent, None if grid is None else tuple(grid.transform)

    def _grid_of(self, position: int) -> Grid:
        scene, _, extent = self.archive.matches.scene(position)
        if scene is None:
            assert self._source is not None
            raise LabelError(
                f'{self.files_of(position)[0]}: no CRS, so that {self._source.path} cannot be laid '
                'on it; give the labels as a band of the table'
            )
        return scene.crop(*extent)

    def _band_of(self, position: int) -> _Labels:
        """Labels that are a band of the table."""
        assert self.mask is not None
        alone = copy(self.archive)
        alone.bands, alone.sensors = (self.mask,), (sensor_of(self.mask).name,)
        alone.allow_missing, alone.transforms = (), None
        sample = alone.read_or_raise(position)
        values, known = sample['image'][0].numpy(), sample['valid'].numpy()
        if self.target == 'regression':
            return np.where(known, values, np.float32(np.nan))
        known = known & (values != NO_CLASS)
        (path, *_) = alone.matches.paths(position, alone.sensors[0])
        check_values(
            FilePath(path), values[known], self._legend, 'add them, or give a nodata value'
        )
        return np.where(known, values, NO_CLASS).astype(np.uint8)


def _open(labels: str | Mapping[str, Any], legend: Legend | None) -> LabelSource | None:
    """The file of labels; None if they are a band of the table."""
    if isinstance(labels, str):
        return None
    known = {'path', 'column', 'all_touched'}
    if 'path' not in labels or set(labels) - known:
        raise LabelError(
            f"labels {dict(labels)}: give 'path', and 'column' and 'all_touched' if need be; or "
            "the name of a band of the table, such as 'landcover.class'"
        )
    return open_labels(**labels, legend=legend)


def _known(labels: _Labels) -> npt.NDArray[np.bool_]:
    return np.isfinite(labels) if labels.dtype.kind == 'f' else labels != NO_CLASS


def _pixels(labels: _Labels, size: int) -> npt.NDArray[np.int64]:
    """Number of pixels of each class."""
    values = labels[labels != NO_CLASS].astype(np.uint8)
    return np.bincount(values, minlength=size).astype(np.int64)
