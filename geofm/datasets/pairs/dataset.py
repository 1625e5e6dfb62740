"""Matched files of several sensors as a TorchGeo dataset, read on the grid of one sensor."""

from collections.abc import Callable
from functools import lru_cache
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import torch
from matplotlib.figure import Figure
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from torchgeo.datasets import GeoDataset
from torchgeo.datasets.utils import GeoSlice, Sample

from geofm.datasets.footprints import SEARCH_CRS
from geofm.datasets.pairs.failures import FailureLog
from geofm.datasets.pairs.intersection import PairIntersection
from geofm.datasets.pairs.matches import Extent, MatchTable
from geofm.datasets.pairs.reading import BrokenFileError, Place, Target, check_not_empty, read_file
from geofm.datasets.pairs.search import FrameSearch, TableSearch, best_pair
from geofm.datasets.pairs.skipped import Skipped
from geofm.datasets.plot import plot_pair
from geofm.lonlat import CIRCLE, near
from geofm.sensor_rasters import MOST_VALUES
from geofm.sensors import RGB_BANDS, SENSORS, sensor_channels

#: What to do if a file cannot be read.
OnError = Literal['raise', 'skip']

#: Number of replacements that are tried for a sample that cannot be read, before an error is
#: raised.
MOST_SKIPPED = 10


class EmptySplitError(ValueError):
    """No samples are left for the requested split and filters, although there are data."""


class MatchedDataset(GeoDataset):
    """Matched observations of several sensors, read on the grid of one of them.

    Subclasses determine which observations match. The table of matches consists of arrays that
    worker processes share, see :class:`geofm.datasets.pairs.matches.MatchTable`.

    Attributes:
        matches: The table of matches, which subclasses set.
        sensors: Keys of the sensors, in canonical order.
        reference: The sensor on whose grid samples are read.
        bands: Names of the channels of 'image'.
        allow_missing: Sensors that may be missing in a sample. If there are any, samples have
            'present'.
        transforms: Applied to each sample after everything else.
        on_error: What to do if a file cannot be read: 'raise' or 'skip'.
        skipped: The files left out, by reason.
    """

    rgb_bands = RGB_BANDS
    cmap = 'tab20'

    matches: MatchTable
    sensors: tuple[str, ...]
    reference: str
    bands: tuple[str, ...]
    allow_missing: tuple[str, ...] = ()

    def __init__(
        self, transforms: Callable[[Sample], Sample] | None = None, on_error: OnError = 'raise'
    ) -> None:
        """Initialize a new MatchedDataset instance.

        Args:
            transforms: Applied to each sample after everything else.
            on_error: What to do if a file cannot be read.
        """
        self.transforms = transforms
        self.on_error = on_error
        self.skipped = Skipped()
        self._failures = FailureLog() if on_error == 'skip' else None
        self._frame: gpd.GeoDataFrame | None = None
        self._is_set = False
        self._search_in(SEARCH_CRS)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a worker process, without index and search."""
        state = {**self.__dict__, '_search': None}
        if not self._is_set:
            state['_frame'] = None
        if get_spawning_popen() is not None:
            # Workers do not need the list of skipped files, which may be long.
            state['skipped'] = Skipped()
        return state

    @property
    def pairs(self) -> Any:
        """Alias of :attr:`matches`, for data sets of two sensors."""
        return self.matches

    def __and__(self, other: GeoDataset) -> PairIntersection:
        """Join the matches with another dataset, such as a raster of labels.

        Args:
            other: A RasterDataset or VectorDataset.

        Returns:
            A dataset that reads both on the grid of each match.

        Raises:
            RuntimeError: If the datasets do not overlap in space and time.
            TypeError: If *other* is neither a RasterDataset nor a VectorDataset.
        """
        return PairIntersection(self, other)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.matches)

    @property
    def index(self) -> gpd.GeoDataFrame:
        """Table with one row per sample, in which matches of one place are adjacent.

        It is created on first access, e.g. by TorchGeo's samplers. Reading samples by index does
        not need it. The columns are those of the ``frame`` method of :attr:`matches`: the geometry
        is the outline of the grid, and the interval reaches from the earliest to the latest day.
        Assigning another table replaces the samples by its rows.
        """
        self._check_ground()
        if self._frame is None:
            self._frame = self.matches.frame(self._crs)
        return self._frame

    @index.setter
    def index(self, frame: gpd.GeoDataFrame) -> None:
        self.matches = self.matches.select(frame)
        self._frame, self._is_set = frame, True
        self._search_in(frame.crs)

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of the index. Samples are read in their own CRS."""
        return self._crs

    @crs.setter
    def crs(self, new_crs: pyproj.CRS) -> None:
        if new_crs != self._crs:
            self._search_in(pyproj.CRS(new_crs))
            self._frame = self._frame.to_crs(self._crs) if self._is_set else None  # type: ignore[union-attr]

    def _search_in(self, crs: pyproj.CRS) -> None:
        """Set the CRS of spatial queries."""
        self._crs = crs
        self._native_crs = CRS.from_user_input(crs)
        self._search: TableSearch | FrameSearch | None = None
        self._bounds: tuple[slice, slice, slice] | None = None

    @property
    def bounds(self) -> tuple[slice, slice, slice]:
        """Bounds of all samples in x, y and time."""
        self._check_ground()
        if self._bounds is None:
            left, bottom, right, top = self._searched().bounds
            start, stop = self._searched().spans(np.arange(len(self)))
            when = slice(pd.Timestamp(start.min()), pd.Timestamp(stop.max()), 1)
            self._bounds = slice(left, right), slice(bottom, top), when
        # The resolution may have been set since.
        steps = zip(self._bounds, (*self.res, 1), strict=True)
        x, y, t = (slice(axis.start, axis.stop, step) for axis, step in steps)
        return x, y, t

    @property
    def failures(self) -> int:
        """Number of samples that could not be read and were replaced, in all processes."""
        return 0 if self._failures is None else len(self._failures.read())

    def failed(self, start: int = 0) -> list[str]:
        """Return the files that could not be read and were replaced, for ``on_error='skip'``.

        Args:
            start: Number of files to leave out, in order of failure.

        Returns:
            The files. A file is listed each time that it could not be read.
        """
        return [] if self._failures is None else self._failures.read(start)

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Return the files that a sample is read from.

        Args:
            index: Index of the sample, its 'index'.

        Returns:
            The files of all sensors.

        Raises:
            IndexError: If there is no such sample.
        """
        position = self._position(index)
        paths = (self.matches.paths(position, sensor) for sensor in self.sensors)
        return [Path(path) for files in paths for path in files]

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Return the size of a sample.

        Args:
            index: Index of the sample.

        Returns:
            Height and width in pixels.
        """
        extent = self.matches.scene(self._position(index))[2]
        return extent.height, extent.width

    def __getitem__(self, index: SupportsIndex | GeoSlice) -> Sample:
        """Read a sample by its index or by place and time.

        Given a slice, the sample that overlaps it most in space is read, among those that intersect
        it in space and time. If several overlap it equally, such as the dates of a place, the
        sample whose interval is most similar to that of the slice (by intersection over union) is
        read, and otherwise the first in the index. Hence the bounds and interval of a row of the
        index give the whole sample of that row.

        The box is transformed to the CRS of the sample and read as a window without resampling. The
        size of the window is rounded to whole pixels (at least one), its position to the nearest
        pixel, and it is clipped to the sample. A box of k x k pixels gives k x k pixels if the
        sample is in the CRS of the index, and fewer or more otherwise, e.g. in UTM, whose pixels
        are not square in degrees.

        Args:
            index: Index of the sample, or [xmin:xmax, ymin:ymax, tmin:tmax] in the CRS of the
                dataset. For longitudes, xmax may exceed 180, or be less than xmin if the box
                crosses the antimeridian.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the slice has a step other than the resolution of the dataset, or a file
                cannot be read.
        """
        if isinstance(index, SupportsIndex):
            return self.read_pair(self._position(index))
        self._check_ground()
        x, y, t = self._complete(index)
        for axis, given, own in (('x', x.step, self.res[0]), ('y', y.step, self.res[1])):
            if given is not None and given != own:
                raise ValueError(
                    f'{axis} step {given} needs resampling, but samples are read on their own '
                    f'grid: remove the step and resample the sample'
                )
        box = (x.start, y.start, x.stop, y.stop)
        when = pd.Timestamp(t.start), pd.Timestamp(t.stop)
        position = best_pair(self._searched(), box, *when)
        if position is None:
            raise IndexError(f'index: {index} not found in dataset with bounds: {self.bounds}')
        return self.read_pair(position, self._window(position, box))

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read a sample, or a window of it, on the grid of its reference file.

        Args:
            position: Index of the sample, a row of the index.
            window: Window of the sample, in whole pixels. Default: the whole sample.

        Returns:
            A dictionary of tensors:

            * image: float32 (C, H, W), in the unit of each sensor, with the channels :attr:`bands`;
              0 in the channels of a missing sensor
            * valid: bool (H, W), True where all sensors that are present have data, by the rules of
              :mod:`geofm.validity` and the masks of the files. Where it is False, the values
              of the image are meaningless and may be NaN.
            * dates: int64 (S,), days since 1970-01-01, one per sensor of the table of matches
            * present: bool (S,), whether the sample has each sensor of :attr:`sensors`; only if
              :attr:`allow_missing` is not empty
            * bounds: float64 (4,), left, bottom, right, top in the CRS of the sample
            * transform: float64 (6,), affine coefficients a, b, c, d, e, f
            * crs: int64 (), EPSG code
            * index: int64 (), index of the sample that was read, for :meth:`files_of`

            If the files are not georeferenced, 'bounds', 'transform' and 'crs' are missing.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the window is not inside the sample or too large, or a file cannot be
                read.
        """
        position = self._position(position)
        for _ in range(MOST_SKIPPED if self.on_error == 'skip' else 0):
            try:
                return self.read_or_raise(position, window)
            except BrokenFileError as err:
                self.note_failure(err)
                position = self._another(position)
        return self.read_or_raise(position, window)

    def note_failure(self, error: BrokenFileError) -> None:
        """Record a file that could not be read and was replaced by another.

        Args:
            error: The error.
        """
        assert self._failures is not None
        self._failures.add(error.path)

    def _another(self, position: int) -> int:
        """Draw another sample of the same size at random."""
        sizes = self.matches.sizes(slice(None))
        like = np.flatnonzero((sizes == sizes[position]).all(axis=1))
        return int(like[int(torch.randint(len(like), ()))])

    def read_or_raise(self, position: int, window: Window | None = None) -> Sample:
        """Read this sample, without replacing it on failure.

        Args:
            position: Index of the sample.
            window: See :meth:`read_pair`.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            BrokenFileError: If a file cannot be read. It is a ValueError.
            ValueError: If the window is not inside the sample, or too large.
        """
        scene, epsg, extent = self.matches.scene(position)
        if window is not None:
            extent = self._part(position, extent, window)
        if len(self.bands) * extent.height * extent.width > MOST_VALUES:
            raise ValueError(
                f'{self._name(position)}: {extent.height} x {extent.width} pixels of '
                f'{len(self.bands)} bands are too many to read at once: read windows (patch_size '
                f'of the data module)'
            )
        is_all = scene is None or (scene.height, scene.width) == extent[2:]
        grid = scene if scene is None or is_all else scene.crop(*extent)
        place = Place(grid, epsg, extent)
        # np.zeros would write all pixels twice.
        image = np.empty((len(self.bands), extent.height, extent.width), dtype=np.float32)
        valid = np.ones(image.shape[1:], dtype=bool)
        present = []
        for key in self.sensors:
            names, channels = _channels(self.bands, key)
            target = image[channels]
            present.append(self._read(position, key, names, place, (target, valid)))
            if not present[-1]:
                target[:] = 0
            if not isinstance(channels, slice):
                image[channels] = target
        if window is None and not valid.any():
            # A window may be in a gap, but a whole sample must have a valid pixel.
            self._check_not_empty(position, place)
        sample: Sample = {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(valid),
            'dates': torch.from_numpy(self.matches.days(position)),
        }
        if self.allow_missing:
            sample['present'] = torch.tensor(present)
        if grid is not None:
            sample['bounds'] = torch.tensor(tuple(grid.bounds), dtype=torch.float64)
            sample['transform'] = torch.tensor(tuple(grid.transform)[:6], dtype=torch.float64)
            sample['crs'] = torch.tensor(epsg)
        sample['index'] = torch.tensor(position)
        return sample if self.transforms is None else self.transforms(sample)

    def _part(self, position: int, extent: Extent, window: Window) -> Extent:
        """Return the part of the reference file that a window of a sample covers."""
        if not _is_inside(window, extent):
            raise ValueError(
                f'{self._name(position)}: {window} does not consist of whole pixels inside '
                f'{extent.height} rows and {extent.width} columns'
            )
        col, row, width, height = (int(v) for v in window.flatten())
        return Extent(extent.row + row, extent.col + col, height, width)

    def _name(self, position: int) -> str:
        """Return the reference file of a sample, for error messages."""
        return next(iter(self.matches.paths(position, self.reference)), f'sample {position}')

    def _read(
        self, position: int, sensor: str, bands: tuple[str, ...], place: Place, target: Target
    ) -> bool:
        """Read the bands of a sensor, and return whether the sample has it."""
        paths = self.matches.paths(position, sensor)
        for path in paths:
            read_file(path, bands, SENSORS[sensor], place, target, sensor != self.reference)
        return bool(paths)

    def _check_not_empty(self, position: int, place: Place) -> None:
        """Raise an error if a file is the reason why a sample has no valid pixel."""
        for sensor in self.sensors:
            for path in self.matches.paths(position, sensor):
                check_not_empty(path, SENSORS[sensor], place)

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw a sample: an image per sensor, and mask and prediction if given.

        Args:
            sample: A sample of this dataset, in raw units.
            show_titles: Whether to show a title above each panel.
            suptitle: Title of the figure.

        Returns:
            The figure.

        Raises:
            RGBBandsMissingError: If the dataset has neither B04, B03 and B02 nor VV and VH.
        """
        return plot_pair(
            sample, self.bands, cmap=self.cmap, show_titles=show_titles, suptitle=suptitle
        )

    def _position(self, index: SupportsIndex) -> int:
        """Return the index of a sample, counted from the start."""
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f'sample {position} of {len(self)}: out of range')
        return position % len(self)

    def _check_ground(self) -> None:
        """Raise an error if samples cannot be searched by place. Overridden."""

    def _complete(self, index: GeoSlice) -> tuple[slice, slice, slice]:
        """Return slices in which every start and stop is given."""
        if isinstance(index, tuple) and len(index) == 3:
            x, y, t = index
            if None not in (x.start, x.stop, y.start, y.stop, t.start, t.stop):
                return x, y, t
        # Only if needed, as finding the bounds of a large dataset takes time.
        return self._disambiguate_slice(index)

    def _searched(self) -> TableSearch | FrameSearch:
        """Return the spatial search over all samples; it is created on first use."""
        if self._search is None:
            frame = self._frame if self._is_set else None
            self._search = (
                TableSearch(self.matches, self._crs) if frame is None else FrameSearch(frame)
            )
        return self._search

    def _window(self, position: int, box: tuple[float, float, float, float]) -> Window:
        """Return the window of a sample that a box in the CRS of the dataset overlaps."""
        grid = self.matches.grid(position)
        crs = self._native_crs
        if crs.is_geographic and box[0] > box[2]:
            box = (box[0], box[1], box[2] + CIRCLE, box[3])
        left, bottom, right, top = (
            box if crs == grid.crs else transform_bounds(crs, grid.crs, *box, densify_pts=21)
        )
        if grid.crs.is_geographic:
            # Longitudes of the patch and of the box may differ by 360 degrees.
            middle, _ = grid.transform @ (grid.width / 2, grid.height / 2)
            shift = float(near((left + right) / 2, middle)) - (left + right) / 2
            left, right = left + shift, right + shift
        rows, cols = grid.pixel_of([left, right, right, left], [top, top, bottom, bottom])
        row, height = _clip(rows.min(), rows.max(), grid.height)
        col, width = _clip(cols.min(), cols.max(), grid.width)
        return Window(col, row, width, height)


@lru_cache(maxsize=64)
def _channels(bands: tuple[str, ...], sensor: str) -> tuple[tuple[str, ...], Any]:
    """Return the bands of a sensor, and their channels as a slice if possible, else as a list."""
    channels = sensor_channels(bands).get(sensor, [])
    names = tuple(bands[i] for i in channels)
    first, count = (channels[0], len(channels)) if channels else (0, 0)
    if channels == list(range(first, first + count)):
        return names, slice(first, first + count)
    return names, channels


def _clip(start: float, stop: float, size: int) -> tuple[int, int]:
    """Return first pixel and number of pixels, rounded to whole pixels and clipped to the patch.

    The number of pixels is rounded, and not the end: boxes of samplers are on a lattice that starts
    at the corner of the dataset and is shifted by part of a pixel against the patches of other
    ROIs. They must still give windows of the requested size.
    """
    first = round(start)
    last = first + round(stop - start)
    # A box that overlaps the patch by less than half a pixel gets one pixel.
    first, last = min(max(first, 0), size - 1), min(last, size)
    return first, max(last - first, 1)


def _is_inside(window: Window, extent: Extent) -> bool:
    """Check whether a window consists of whole pixels inside a part of a file."""
    col, row, width, height = window.flatten()
    return (
        all(float(v).is_integer() for v in (col, row, width, height))
        and 0 <= col < col + width <= extent.width
        and 0 <= row < row + height <= extent.height
    )
