"""Files of several sensors as a TorchGeo data set, matched and read on the grid of one of them."""

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
from geofm.datasets.pairs.reading import BrokenFileError, Place, Target, read_file, refuse_empty
from geofm.datasets.pairs.search import FrameSearch, TableSearch, best_pair
from geofm.datasets.pairs.skipped import Skipped
from geofm.datasets.plot import plot_pair
from geofm.lonlat import CIRCLE, near
from geofm.sensor_rasters import MOST_VALUES
from geofm.sensors import RGB_BANDS, SENSORS, sensor_channels

#: What to do about a file that cannot be read any more.
OnError = Literal['raise', 'skip']

#: Pairs that are tried in place of one that cannot be read, before that is an error all the same.
MOST_SKIPPED = 10


class EmptySplitError(ValueError):
    """There are data, but none of the split and with the filters asked for."""


class MatchedDataset(GeoDataset):
    """Observations of several sensors that show the same ground, read on the grid of one of them.

    Which observations match, a subclass finds out. The table of the matches is made of arrays that
    worker processes share, see :class:`geofm.datasets.pairs.matches.MatchTable`.

    Attributes:
        matches: The table. A subclass sets it.
        sensors: Sensors of a sample, in canonical order.
        reference: The sensor that gives the grid.
        bands: Names of the channels of 'image'.
        allow_missing: Sensors that a sample may lack. If there are any, samples have 'present'.
        transforms: Applied to each sample, last.
        on_error: What is done about a file that cannot be read.
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
            transforms: Applied to each sample, last.
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
        """State for a copy or a worker, which make the index and the search again if need be."""
        state = {**self.__dict__, '_search': None}
        if not self._is_set:
            state['_frame'] = None
        if get_spawning_popen() is not None:
            # A worker reads, and what was left out may be many names.
            state['skipped'] = Skipped()
        return state

    @property
    def pairs(self) -> Any:
        """The table of the matches, under the name of data sets of two sensors."""
        return self.matches

    def __and__(self, other: GeoDataset) -> PairIntersection:
        """Join the matches with another data set, such as a raster of labels.

        Args:
            other: A RasterDataset or VectorDataset.

        Returns:
            Both, read on the grid of each match.

        Raises:
            RuntimeError: If the data sets have no ground or no time in common.
            TypeError: If *other* is neither a RasterDataset nor a VectorDataset.
        """
        return PairIntersection(self, other)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.matches)

    @property
    def index(self) -> gpd.GeoDataFrame:
        """One row per sample, matches of one place next to each other.

        It is made when it is first asked for, as TorchGeo's samplers do, and is not needed to read
        samples by number. Columns as in the ``frame`` method of :attr:`matches`: the geometry is
        the outline of the grid, the interval reaches from the earliest to the latest day. To change
        it, set another one: its rows are then the samples.
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
        """CRS of the index. Samples are read in their own, whatever this is."""
        return self._crs

    @crs.setter
    def crs(self, new_crs: pyproj.CRS) -> None:
        if new_crs != self._crs:
            self._search_in(pyproj.CRS(new_crs))
            self._frame = self._frame.to_crs(self._crs) if self._is_set else None  # type: ignore[union-attr]

    def _search_in(self, crs: pyproj.CRS) -> None:
        """Search in a CRS from now on."""
        self._crs = crs
        self._native_crs = CRS.from_user_input(crs)
        self._search: TableSearch | FrameSearch | None = None
        self._bounds: tuple[slice, slice, slice] | None = None

    @property
    def bounds(self) -> tuple[slice, slice, slice]:
        """Bounds of all samples: x, y and time."""
        self._check_ground()
        if self._bounds is None:
            left, bottom, right, top = self._searched().bounds
            start, stop = self._searched().spans(np.arange(len(self)))
            when = slice(pd.Timestamp(start.min()), pd.Timestamp(stop.max()), 1)
            self._bounds = slice(left, right), slice(bottom, top), when
        # The resolution may be set.
        steps = zip(self._bounds, (*self.res, 1), strict=True)
        x, y, t = (slice(axis.start, axis.stop, step) for axis, step in steps)
        return x, y, t

    @property
    def failures(self) -> int:
        """Number of samples that could not be read and were replaced, in all processes."""
        return 0 if self._failures is None else len(self._failures.read())

    def failed(self, start: int = 0) -> list[str]:
        """Files that could not be read and were replaced, only with ``on_error='skip'``.

        Args:
            start: Number of those to leave out, in the order in which they failed.

        Returns:
            The files; one that was tried several times as often.
        """
        return [] if self._failures is None else self._failures.read(start)

    def files_of(self, index: SupportsIndex) -> list[Path]:
        """Files behind a sample.

        Args:
            index: Number of the sample, its 'index'.

        Returns:
            The files of its sensors.

        Raises:
            IndexError: If there is no such sample.
        """
        position = self._position(index)
        paths = (self.matches.paths(position, sensor) for sensor in self.sensors)
        return [Path(path) for files in paths for path in files]

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Size of a sample.

        Args:
            index: Number of the sample.

        Returns:
            Height and width in pixels.
        """
        extent = self.matches.scene(self._position(index))[2]
        return extent.height, extent.width

    def __getitem__(self, index: SupportsIndex | GeoSlice) -> Sample:
        """Read a sample by its number or by place and time.

        Among the samples that a slice touches in space and time, the one is read that it overlaps
        most in space; of several (the dates of a place) the one whose interval is most
        like the slice's (intersection over union); of several still, the first in the index. So
        the bounds and interval of a row of the index give its own sample, whole.

        The box is projected into the CRS of that sample and read as a window of the nearest whole
        number of pixels (one at least), placed at the nearest pixel and clipped to the
        sample: nothing is resampled. A box of k x k pixels gives k x k in samples in the CRS of the
        index, and fewer or more elsewhere, e.g. in UTM, whose pixels are not squares of degrees.

        Args:
            index: Number of the sample, or [xmin:xmax, ymin:ymax, tmin:tmax] in the CRS of the
                dataset. Of longitudes, xmax may be beyond 180, or less than xmin: the box then
                crosses 180 degrees.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the slice has a step that is not the resolution of the dataset, or a
                file cannot be read.
        """
        if isinstance(index, SupportsIndex):
            return self.read_pair(self._position(index))
        self._check_ground()
        x, y, t = self._complete(index)
        for axis, given, own in (('x', x.step, self.res[0]), ('y', y.step, self.res[1])):
            if given is not None and given != own:
                raise ValueError(
                    f'{axis} step {given} asks for resampling, but samples are read on their own '
                    f'grid: leave the step away and resample the sample'
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
            position: Number of the sample, a row of the index.
            window: Window of the sample, in whole pixels; all of it by default.

        Returns:
            A dictionary of tensors:

            * image: float32 (C, H, W), in the unit of each sensor, channels as in :attr:`bands`;
              0 in the channels of a sensor that the sample lacks
            * valid: bool (H, W), True where all sensors that are there have data, by the rule of
              :mod:`geofm.validity` and the masks of the files. Values elsewhere mean nothing and
              may be NaN.
            * dates: int64 (S,), days since 1970-01-01, one per sensor of the table of the matches
            * present: bool (S,), one per sensor of :attr:`sensors`: whether the sample has it.
              Only if :attr:`allow_missing` names any.
            * bounds: float64 (4,), left, bottom, right, top in the CRS of the sample
            * transform: float64 (6,), affine coefficients a, b, c, d, e, f
            * crs: int64 (), EPSG code
            * index: int64 (), number of the sample that was read, for :meth:`files_of`

            Without 'bounds', 'transform' and 'crs' where the files are not georeferenced.

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
        """Count a file that could not be read and was replaced by another.

        Args:
            error: What was raised.
        """
        assert self._failures is not None
        self._failures.add(error.path)

    def _another(self, position: int) -> int:
        """Another sample of the same size, drawn at random."""
        sizes = self.matches.sizes(slice(None))
        like = np.flatnonzero((sizes == sizes[position]).all(axis=1))
        return int(like[int(torch.randint(len(like), ()))])

    def read_or_raise(self, position: int, window: Window | None = None) -> Sample:
        """Read this sample and no other, whatever is to be done about errors.

        Args:
            position: Number of the sample.
            window: As of :meth:`read_pair`.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            BrokenFileError: If a file cannot be read; a ValueError.
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
        # Not zeros, which would write all pixels twice.
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
            # A window may well lie in a gap, what the scan found sound may not.
            self._refuse_empty(position, place)
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
        """Part of the reference file that a window of a sample is."""
        if not _is_inside(window, extent):
            raise ValueError(
                f'{self._name(position)}: {window} is not made of whole pixels inside '
                f'{extent.height} rows and {extent.width} columns'
            )
        col, row, width, height = (int(v) for v in window.flatten())
        return Extent(extent.row + row, extent.col + col, height, width)

    def _name(self, position: int) -> str:
        """The reference file of a sample, for an error."""
        return next(iter(self.matches.paths(position, self.reference)), f'sample {position}')

    def _read(
        self, position: int, sensor: str, bands: tuple[str, ...], place: Place, target: Target
    ) -> bool:
        """Read the bands of a sensor; whether the sample has it."""
        paths = self.matches.paths(position, sensor)
        for path in paths:
            read_file(path, bands, SENSORS[sensor], place, target, sensor != self.reference)
        return bool(paths)

    def _refuse_empty(self, position: int, place: Place) -> None:
        """Refuse a sample without a valid pixel, if that is because of one of its files."""
        for sensor in self.sensors:
            for path in self.matches.paths(position, sensor):
                refuse_empty(path, SENSORS[sensor], place)

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw a sample: true colour, S1 composite, and where given mask and prediction.

        Args:
            sample: A sample of this dataset, in raw units.
            show_titles: Whether to write a title above each panel.
            suptitle: Title of the figure.

        Returns:
            The figure.

        Raises:
            RGBBandsMissingError: If the dataset has neither B04, B03, B02 nor VV, VH.
        """
        return plot_pair(
            sample, self.bands, cmap=self.cmap, show_titles=show_titles, suptitle=suptitle
        )

    def _position(self, index: SupportsIndex) -> int:
        """Number of a sample, counted from the start."""
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f'sample {position} of {len(self)}: out of range')
        return position % len(self)

    def _check_ground(self) -> None:
        """Refuse to search by place, if samples lie nowhere on the ground."""

    def _complete(self, index: GeoSlice) -> tuple[slice, slice, slice]:
        """Slices with every start and stop given."""
        if isinstance(index, tuple) and len(index) == 3:
            x, y, t = index
            if None not in (x.start, x.stop, y.start, y.stop, t.start, t.stop):
                return x, y, t
        # Only here: to find the bounds of the dataset takes time in proportion to its size.
        return self._disambiguate_slice(index)

    def _searched(self) -> TableSearch | FrameSearch:
        """The search among all samples, made when it is first needed."""
        if self._search is None:
            frame = self._frame if self._is_set else None
            self._search = (
                TableSearch(self.matches, self._crs) if frame is None else FrameSearch(frame)
            )
        return self._search

    def _window(self, position: int, box: tuple[float, float, float, float]) -> Window:
        """Window of a sample that a box in the CRS of the dataset overlaps."""
        grid = self.matches.grid(position)
        crs = self._native_crs
        if crs.is_geographic and box[0] > box[2]:
            box = (box[0], box[1], box[2] + CIRCLE, box[3])
        left, bottom, right, top = (
            box if crs == grid.crs else transform_bounds(crs, grid.crs, *box, densify_pts=21)
        )
        if grid.crs.is_geographic:
            # The patch and the box may be given on different turns around the globe.
            middle, _ = grid.transform @ (grid.width / 2, grid.height / 2)
            shift = float(near((left + right) / 2, middle)) - (left + right) / 2
            left, right = left + shift, right + shift
        rows, cols = grid.pixel_of([left, right, right, left], [top, top, bottom, bottom])
        row, height = _clip(rows.min(), rows.max(), grid.height)
        col, width = _clip(cols.min(), cols.max(), grid.width)
        return Window(col, row, width, height)


@lru_cache(maxsize=64)
def _channels(bands: tuple[str, ...], sensor: str) -> tuple[tuple[str, ...], Any]:
    """Bands of a sensor, and their channels: a slice, or else their numbers."""
    channels = sensor_channels(bands).get(sensor, [])
    names = tuple(bands[i] for i in channels)
    first, count = (channels[0], len(channels)) if channels else (0, 0)
    if channels == list(range(first, first + count)):
        return names, slice(first, first + count)
    return names, channels


def _clip(start: float, stop: float, size: int) -> tuple[int, int]:
    """First pixel and number of pixels, at the nearest whole pixels and inside the patch.

    The number is rounded, not the end: samplers step on a lattice that starts at the corner of
    the dataset, on which the patches of other ROIs are out of step by part of a pixel, and they
    must get the size that they ask for all the same.
    """
    first = round(start)
    last = first + round(stop - start)
    # What overlaps by less than half a pixel gets that pixel.
    first, last = min(max(first, 0), size - 1), min(last, size)
    return first, max(last - first, 1)


def _is_inside(window: Window, extent: Extent) -> bool:
    """Whether a window is one or more whole pixels of a part."""
    col, row, width, height = window.flatten()
    return (
        all(float(v).is_integer() for v in (col, row, width, height))
        and 0 <= col < col + width <= extent.width
        and 0 <= row < row + height <= extent.height
    )


#: The name of data sets of pairs before there were more than two sensors.
PairDataset = MatchedDataset
