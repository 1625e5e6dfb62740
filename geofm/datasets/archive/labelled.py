"""Samples of a table of rasters with labels."""

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

from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.archive.masked import IGNORE, TargetArchive
from geofm.datasets.labels import LabelError, LabelSource, open_labels
from geofm.datasets.labels.source import check_values
from geofm.datasets.pairs.dataset import EmptySplitError
from geofm.datasets.plot import plot_pair
from geofm.datasets.table import RasterTable
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend
from geofm.sensors import sensor_of

#: Type of the target: the class or a number of each pixel, the classes that occur in a sample, or
#: the class that covers most of it.
Target = Literal['segmentation', 'regression', 'multilabel', 'majority']

#: Classes in a configuration: their number, their names, or a mapping from name to value.
type Classes = int | Sequence[str] | Mapping[str, Any]

type _Labels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


class LabelledArchive(TargetArchive):
    """Samples of a table of rasters with labels.

    Labels are read on the grid of each sample, from a file of polygons, points or pixels, or from a
    band of the table. Samples without labels are left out, and counted in :attr:`skipped`.

    Attributes:
        target: Type of the target.
        ignore_index: Value of 'mask' where there is no label.
        counts: Frequency of each class, int64 (L,): number of pixels for 'segmentation', and number
            of samples for 'multilabel' and 'majority'. Empty for 'regression'.
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
        **kwargs: Any,
    ) -> None:
        """Initialize a new LabelledArchive instance.

        Args:
            table: A table of rasters, or its file.
            sensors: Keys of the sensors of 'image'.
            labels: Arguments of :func:`geofm.datasets.labels.open_labels`, e.g.
                ``{'path': 'labels.gpkg', 'column': 'class'}``; or a band of the table, e.g.
                ``'landcover.class'``.
            classes: The classes, see :meth:`geofm.legend.Legend.of`. Default: those of the file.
                Required for labels in a band of the table.
            target: 'segmentation' and 'regression' give a 'mask' (H, W); 'multilabel' and
                'majority' give a 'label' of the whole sample.
            ignore_index: Value of 'mask' where there is no label, for 'segmentation'.
            min_labelled: Smallest labelled fraction of a sample, 0 to 1. Samples below it, or
                without any labelled pixel, are left out.
            **kwargs: Further arguments of :class:`~geofm.datasets.archive.masked.TargetArchive`,
                and of :class:`~geofm.datasets.RasterArchive`.

        Raises:
            BandError: If a band is unknown, or the labels are a band of 'image'.
            EmptySplitError: If no sample of the split has a label. It is a ValueError.
            LabelError: If the labels cannot be used. It is a ValueError.
            ValueError: See :class:`~geofm.datasets.RasterArchive`. Also if another argument is out
                of range, or *ignore_index* is the value of a class.
        """
        if target not in get_args(Target):
            raise ValueError(f"unknown target '{target}': choose from {list(get_args(Target))}")
        if not 0 <= min_labelled <= 1:
            raise ValueError(f'min_labelled must be a fraction from 0 to 1, not {min_labelled}')
        self.target: Target = target
        self.ignore_index = ignore_index
        self.min_labelled = min_labelled
        legend = None if classes is None else Legend.of(classes)
        self._source = _open(labels, legend)
        mask = labels if isinstance(labels, str) else None
        if mask is not None and legend is None and target != 'regression':
            raise LabelError(f"labels '{mask}' need the argument classes")
        super().__init__(table, sensors, mask, **kwargs)
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
        """Name of each output of a model."""
        legend = self.legend
        return () if legend is None else tuple(legend.name(i) for i in range(legend.size))

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read a sample.

        Args:
            index: Index of the sample.

        Returns:
            The sample, see :meth:`RasterArchive.read_pair`, with the target:

            * 'segmentation': 'mask' int64 (H, W), class values or :attr:`ignore_index`
            * 'regression': 'mask' float32 (H, W), NaN where there is no label
            * 'multilabel': 'label' int64 (L,), 1 for the classes that occur
            * 'majority': 'label' int64 (), the most frequent class of labelled pixels

            Pixels where a sensor has no data are treated as unlabelled in a 'mask', unless the
            sample has no other labels.
        """
        sample = self.read_image(index)
        sample.pop('target', None)
        # If a broken file was skipped, this is the index of another sample.
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
        """Return the labels of a sample, including pixels where sensors have no data.

        Args:
            position: Index of the sample.

        Returns:
            Class values, uint8 (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label. For
            'regression', numbers, float32 (H, W), NaN where there is no label.

        Raises:
            LabelError: If the labels cannot be read.
        """
        if self._source is None:
            return self._band_of(position)
        grid = self._grid_of(position)
        if self.target == 'regression':
            return self._source.numbers_on(grid)
        return self._source.classes_on(grid)

    def balanced_weights(self) -> Tensor:
        """Return class weights that give rare classes the same total weight as frequent ones.

        Returns:
            Weights, float32 (L,): n / (L * n_c) for n samples (or pixels), of which n_c have class
            c, like 'balanced' in scikit-learn; 1 for classes that do not occur.
            For 'multilabel': number of samples without the class / number of those with it, for
            'pos_weight' of PyTorch's BCEWithLogitsLoss.

        Raises:
            ValueError: If the target is 'regression'.
        """
        if self.target == 'regression':
            raise ValueError('class weights are for classes, not for regression')
        counts = torch.from_numpy(self.counts).double()
        occurs = counts > 0
        if self.target == 'multilabel':
            weights = (len(self) - counts) / counts
            # A class that occurs in every sample has no negatives, and would get the weight 0.
            occurs &= counts < len(self)
        else:
            weights = counts.sum() / (occurs.sum() * counts)
        return torch.where(occurs, weights, 1.0).float()

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw a sample: its sensors, its mask in the colours of the classes, and a prediction.

        Args:
            sample: A sample of this dataset, in raw units.
            show_titles: Whether to show a title above each panel.
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
        """Check that *ignore_index* is not the value of a class."""
        if self.target == 'segmentation' and self.legend is not None:
            known = dict(zip(self.legend.values, self.legend.names, strict=True))
            if self.ignore_index in known:
                raise ValueError(
                    f'ignore_index {self.ignore_index} is the value of the class '
                    f"'{known[self.ignore_index]}': pixels without a label would get that class; "
                    f'leave ignore_index at {IGNORE}, in the data and in the task'
                )

    def _keep_labelled(self) -> npt.NDArray[np.int64]:
        """Leave out samples without labels; return the frequency of each class in the others."""
        samples = len(self)
        size = 0 if self.legend is None else self.legend.size
        kept = np.zeros(samples, bool)
        counts = np.zeros(size, np.int64)
        # All dates of a place have the same labels.
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
            reason = f"sample without {enough}, of {samples} in split '{self.archive.split}'"
            self.skipped.add(reason, len(gone), str(self.files_of(int(gone[0]))[0]))
        if not kept.any():
            raise EmptySplitError(
                f'{self.archive.table.source}: left out: {self.skipped}; none is left. Check that '
                'labels and scenes overlap on the ground'
            )
        if len(gone):
            self.archive.matches = self.archive.matches.take(np.flatnonzero(kept))
            self.skipped.warn()
        return counts

    def _count(self, labels: _Labels, size: int) -> tuple[bool, npt.NDArray[np.int64]]:
        """Return whether labels are sufficient, and the frequency of each class."""
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
        """Return the label of a whole sample."""
        assert self.legend is not None
        pixels = _pixels(labels, self.legend.size)
        if self.target == 'multilabel':
            return (pixels > 0).astype(np.int64)
        return np.asarray(pixels.argmax(), np.int64)

    def _place(self, position: int) -> tuple[Any, ...]:
        """Return a key that is common to samples on the same pixels."""
        grid, epsg, extent = self.archive.matches.scene(position)
        return epsg, extent, None if grid is None else tuple(grid.transform)

    def _grid_of(self, position: int) -> Grid:
        scene, _, extent = self.archive.matches.scene(position)
        if scene is None:
            assert self._source is not None
            raise LabelError(
                f'{self.files_of(position)[0]}: no CRS, so that {self._source.path} cannot be read '
                'on its grid; give the labels as a band of the table'
            )
        return scene.crop(*extent)

    def _band_of(self, position: int) -> _Labels:
        """Read labels from a band of the table."""
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
            FilePath(path), values[known], self._legend, 'add these classes, or set a nodata value'
        )
        return np.where(known, values, NO_CLASS).astype(np.uint8)


def _open(labels: str | Mapping[str, Any], legend: Legend | None) -> LabelSource | None:
    """Open the file of labels; None if they are a band of the table."""
    if isinstance(labels, str):
        return None
    known = {'path', 'column', 'all_touched'}
    if 'path' not in labels or set(labels) - known:
        raise LabelError(
            f"labels {dict(labels)}: give 'path', and optionally 'column' and 'all_touched'; or "
            "the name of a band of the table, such as 'landcover.class'"
        )
    return open_labels(**labels, legend=legend)


def _known(labels: _Labels) -> npt.NDArray[np.bool_]:
    return np.isfinite(labels) if labels.dtype.kind == 'f' else labels != NO_CLASS


def _pixels(labels: _Labels, size: int) -> npt.NDArray[np.int64]:
    """Count the pixels of each class."""
    values = labels[labels != NO_CLASS].astype(np.uint8)
    return np.bincount(values, minlength=size).astype(np.int64)
