"""Data module of a table of rasters."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.progress import track
from torch.utils.data import Dataset
from torchgeo.datasets.utils import Sample

from geofm.datamodules.matched import AnySplit, MatchedDataModule
from geofm.datamodules.resumable import TIMEOUT, StartMethod
from geofm.datasets import (
    BandStatistics,
    RandomWindows,
    RasterArchive,
    Seeded,
    SplitRule,
    find_layout,
    write_statistics,
)
from geofm.datasets.archive import Archive, Edge, open_archive
from geofm.datasets.memory import release_memory
from geofm.datasets.pairs import MIN_OVERLAP, OnError
from geofm.datasets.table import file_of, index_folder, open_table
from geofm.printing import counted, warn
from geofm.sensors import SENSORS, bands_of, canonical_order, check_bands, sensor_channels

#: Maximum number of samples whose files are checked for changes before cached statistics are used.
_MOST_LOOKED_AT = 1000

#: Maximum number of windows and of pixels that statistics are computed from.
_MOST_WINDOWS, _MOST_PIXELS = 10_000, 2**30


class RasterArchiveDataModule(MatchedDataModule):
    """Samples of a table of rasters, with any sensors, file layout and scene size.

    .. seealso:: :class:`geofm.datasets.RasterArchive`
    """

    def __init__(
        self,
        table: str | None = None,
        sensors: Sequence[str] = (),
        bands: Sequence[str] | None = None,
        root: str | None = None,
        layout: str | None = None,
        reference: str | None = None,
        split: Mapping[str, Any] | None = None,
        window_size: int | None = None,
        edge: Edge = 'shift',
        patch_size: int | None = None,
        n_dates: int | None = None,
        max_day_gap: int | None = None,
        min_overlap: float = MIN_OVERLAP,
        allow_missing: Sequence[str] = (),
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        start_method: StartMethod | None = None,
        timeout: float = TIMEOUT,
        statistics: str | None = None,
        on_error: OnError = 'raise',
    ) -> None:
        """Initialize a new RasterArchiveDataModule instance.

        Args:
            table: Table of rasters written by ``geofm index``. With *root* and *layout*, it is
                written if it does not exist.
            sensors: Keys of the sensors.
            bands: Names of the bands, in the order of the channels; by default all bands of the
                sensors that are in the files of the table.
            root: Folder of the files, if there is no table yet. They are indexed at the start.
            layout: YAML file that describes the names of the files below *root*, or the name of a
                built-in layout, such as 'images' for pictures in folders.
            reference: Sensor whose grid the samples are on, see
                :class:`~geofm.datasets.RasterArchive`.
            split: How samples are split: ``{'by': 'column' | 'place' | 'blocks', ...}``, the fields
                of a :class:`~geofm.datasets.SplitRule`. By default by the column 'split'
                of the table if there is one; otherwise all samples are for training.
            window_size: Height and width in pixels of the windows that each scene is divided into;
                each window is a sample. By default whole scenes are samples.
            edge: How to treat the remainder at the lower and right edge of a scene: 'shift' the
                last window inwards, or 'drop' the remainder.
            patch_size: Height and width in pixels of the window that is read at a random place of
                each training sample; whole samples by default.
            n_dates: Number of dates k of a place that are combined in a training sample, with
                'image' (k, C, H, W), see :class:`~geofm.datasets.MultiDate`. By default each date
                is a sample of its own.
            max_day_gap: Maximum number of days between an observation and that of the reference
                sensor; by default there is no limit.
            min_overlap: Minimum fraction, 0 to 1, of the area of a sample that each sensor must
                cover.
            allow_missing: Sensors that may be missing in a sample; by default none.
            batch_size: Number of samples in a batch (on each device).
            num_workers: Number of worker processes that read samples.
            seed: Seed of the order of training samples and the positions of their windows. By
                default, the seed of Lightning's ``seed_everything``.
            start_method: Start method of worker processes. Default: Python's default.
            timeout: Maximum time in seconds for workers to load a batch. After that, the run ends
                with an error that lists the files being read. 0 for no limit.
            statistics: YAML file with mean and standard deviation of each band, as written by
                ``geofm stats``; or 'compute', to compute them once from the training samples and
                cache them beside the table. At most 10,000 samples are used, drawn at random, and
                only a window of each if they are large, as stated in the file. By default, the
                statistics that the weights of the model were trained with, or else those of the
                sensors.
            on_error: What to do if a sample cannot be read: 'raise' an error, or 'skip' it. Skipped
                samples are replaced by others, and reported at the end of each epoch.

        Raises:
            BandError: If a band is unknown or given twice.
            SensorError: If a sensor is unknown, or none is given.
            ValueError: If there is neither a table nor a root with a layout, or another argument
                is out of range.
        """
        if table is None and (root is None or layout is None):
            raise ValueError('give a table (written by geofm index), or a root and a layout')
        if (root is None) != (layout is None):
            raise ValueError('give both root and layout, or only a table')
        self.sensors = canonical_order(sensors)
        self.bands = bands_of(self.sensors) if bands is None else check_bands(bands)
        rule = None if split is None else SplitRule(**split)
        super().__init__(
            RasterArchive,
            self.bands,
            batch_size=batch_size,
            num_workers=num_workers,
            patch_size=patch_size,
            n_dates=n_dates,
            seed=seed,
            start_method=start_method,
            timeout=timeout,
            statistics=None if statistics == 'compute' else statistics,
            sensors=self.sensors,
            reference=reference,
            split_by=rule,
            window_size=window_size,
            edge=edge,
            max_day_gap=max_day_gap,
            min_overlap=min_overlap,
            allow_missing=tuple(allow_missing),
            on_error=on_error,
        )
        self.kwargs['bands'] = None if bands is None else self.bands
        self.table_file = None if table is None else Path(table)
        self.root = root
        self.layout = layout
        self.statistics = statistics
        self._table: Archive | None = None
        self._known: dict[AnySplit, RasterArchive] = {}

    def prepare_data(self) -> None:
        """Index the files and compute statistics in a single process, unless this has been done.

        For a large table, this process also writes the files that all processes map to memory.
        """
        if self.table_file is not None and self._archive().folder is not None:
            self._samples('train')
        if self.statistics == 'compute':
            self._computed_statistics(self._samples('train'))
        if self._table is not None and self._table.folder is not None:
            # So that this process uses no more memory than the others.
            self._table = None
            self._known.clear()

    def setup(self, stage: str) -> None:
        """Make the data sets of a stage.

        Args:
            stage: Either 'fit', 'validate', 'test' or 'predict'.

        Raises:
            EmptySplitError: If a split is empty. For fitting, an empty validation split is only a
                warning.
            FileNotFoundError: If there is no table, and no root and layout to make it.
            TableError: If the table is invalid.
        """
        if self.kwargs['bands'] is None:
            self.bands = self._samples('all').bands
            self.kwargs['bands'] = self.bands
            file = None if self.statistics == 'compute' else self.statistics
            self.normalize_by_file(self.bands, file)
        if self.statistics == 'compute':
            known = self._computed_statistics(self._samples('train'))
            names = ('mean', 'std')
            self.normalize_by(
                self.bands, *({b: float(known[b][name]) for b in self.bands} for name in names)
            )
        super().setup(stage)
        if stage == 'fit':
            self._say_samples()
            release_memory()

    @rank_zero_only
    def _say_samples(self) -> None:
        """Print the number of samples, on rank 0."""
        for split in ('train', 'val'):
            if (samples := self._known.get(split)) is not None:
                places = samples.matches.count_places()
                count = counted(len(samples), 'sample')
                rank_zero_info(f'{split}: {count} of {counted(places, "place")}')

    def _archive(self) -> Archive:
        """Open the table, or make it if it does not exist."""
        if self._table is not None:
            return self._table
        file = self.table_file
        if file is not None and (file.exists() or self.root is None):
            self._table = open_archive(str(file))
            return self._table
        assert self.root is not None
        assert self.layout is not None
        indexed = index_folder(self.root, find_layout(self.layout))
        if indexed.unmatched:
            warn(
                f'{self.root}: left out {counted(indexed.unmatched, "file")} without a match in '
                f'{self.layout} (first: {indexed.example})'
            )
        table = open_table(indexed.table)
        self._table = Archive.of(table)
        if file is not None:
            table.write(file)
            self._table = open_archive(str(file))
        return self._table

    def _samples(self, split: AnySplit) -> RasterArchive:
        """Make the data set of a split."""
        # Cached, since matching the observations of a large table takes long.
        known = self._known.get(split)
        if known is None or self.kwargs['bands'] not in (None, known.bands):
            known = RasterArchive(self._archive(), split=split, **self.kwargs)
            self._known[split] = known
        return known

    def _computed_statistics(self, samples: RasterArchive) -> dict[str, dict[str, Any]]:
        """Return the statistics of the training samples, cached in a file beside the table."""
        file = self._statistics_file(samples)
        if file is not None and file.exists():
            return _read(file)
        windows, numbers, which = _read_for_statistics(samples)
        read = (windows[i] for i in track(numbers, 'Statistics'))
        known = archive_statistics(read, samples.bands, samples.sensors)
        if file is not None:
            try:
                about = {'table': str(self.table_file), 'samples': len(samples), 'read': which}
                write_statistics(file, known, about)
            except OSError as error:
                warn(
                    f'{file}: statistics cannot be cached and are computed again each time '
                    f'({error}); give a table in a writable folder'
                )
        return known

    def _statistics_file(self, samples: RasterArchive) -> Path | None:
        """Return the file for the statistics of samples; None without a table file."""
        if self.table_file is None:
            return None
        made_of = {name: str(value) for name, value in self.kwargs.items() if name != 'on_error'}
        table = os.stat(self.table_file)  # noqa: PTH116 - follows links, as reading does
        made_of |= {'bands': str(samples.bands), 'table': f'{table.st_size} {table.st_mtime_ns}'}
        made_of |= {f'sensor {key}': repr(SENSORS[key]) for key in samples.sensors}
        made_of['files'] = _state_of_files(samples)
        text = json.dumps(made_of, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.table_file.with_name(f'{self.table_file.stem}.statistics-{digest}.yaml')


def _read_for_statistics(samples: RasterArchive) -> tuple[Dataset[Sample], Sequence[int], str]:
    """Choose the samples for statistics: all pixels, or a random window of random samples.

    Returns:
        Data set, indices to read, and a description.
    """
    count = min(len(samples), _MOST_WINDOWS)
    pixels = samples.matches.sizes(slice(None)).astype(np.int64).prod(axis=1).sum()
    if count == len(samples) and pixels <= _MOST_PIXELS:
        return samples, range(count), 'all of each'
    drawn = np.random.default_rng(0).choice(len(samples), count, replace=False)
    side = math.isqrt(_MOST_PIXELS // count)
    windows = Seeded(RandomWindows(samples, side))
    return windows, np.sort(drawn).tolist(), f'{count} of them, {side} x {side} pixels of each'


def _state_of_files(samples: RasterArchive) -> str:
    """Return the sizes and modification times of the files of samples, or of a subset of them."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, _MOST_LOOKED_AT).astype(int)).tolist()
    found = []
    for path in dict.fromkeys(p for i in chosen for p in samples.files_of(i)):
        file = file_of(str(path))
        # Files on servers are not checked. Missing files raise an error when they are read.
        if file is not None and os.path.exists(file):  # noqa: PTH110
            state = os.stat(file)  # noqa: PTH116
            found.append((state.st_size, state.st_mtime_ns))
    return str(found)


def archive_statistics(
    samples: Iterable[Sample], bands: Sequence[str], sensors: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Compute the statistics of samples with missing sensors.

    Args:
        samples: Samples with 'image' (C, H, W), 'valid' (H, W) and, if sensors may be missing,
            'present' (S,).
        bands: Names of the channels.
        sensors: Sensors of 'present'.

    Returns:
        See :meth:`geofm.datasets.BandStatistics.result`.

    Raises:
        ValueError: If there is no valid pixel of a sensor.
    """
    channels = sensor_channels(bands)
    known = {key: BandStatistics([bands[i] for i in channels[key]]) for key in sensors}
    everywhere = torch.ones(len(sensors), dtype=torch.bool)
    for sample in samples:
        present = sample.get('present', everywhere).tolist()
        for key, there in zip(sensors, present, strict=True):
            if there:
                known[key].update(sample['image'][channels[key]], sample['valid'])
    if empty := [key for key in sensors if not known[key].pixels]:
        raise ValueError(
            f'no training sample has a valid pixel of {", ".join(empty)} for its statistics: '
            'leave it out, or match it less strictly (max_day_gap, min_overlap)'
        )
    found = {band: values for key in sensors for band, values in known[key].result().items()}
    return {band: found[band] for band in bands}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Read the statistics of all bands from a file."""
    content: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())['bands']
    return content
