"""Pairs of Sentinel-1 and Sentinel-2 files as a TorchGeo data set, each read on its own grid."""

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

from geofm.datasets.catalogue.footprints import SEARCH_CRS
from geofm.datasets.catalogue.scan import Skipped
from geofm.datasets.pairs.failures import FailureLog
from geofm.datasets.pairs.intersection import PairIntersection
from geofm.datasets.pairs.reading import BrokenFileError, read_file, refuse_empty
from geofm.datasets.pairs.search import FrameSearch, TableSearch, best_pair
from geofm.datasets.pairs.table import PairTable
from geofm.datasets.plot import plot_pair
from geofm.grid import Grid
from geofm.lonlat import CIRCLE, near
from geofm.sensor_rasters import MOST_VALUES
from geofm.sensors import BANDS, RGB_BANDS, SENSORS, sensor_channels

#: What to do about a file that cannot be read any more.
OnError = Literal['raise', 'skip']

#: Pairs that are tried in place of one that cannot be read, before that is an error all the same.
MOST_SKIPPED = 10


class PairDataset(GeoDataset):
    """Pairs of a table; which they are, a subclass finds out.

    The table is made of arrays that worker processes share, see
    :class:`geofm.datasets.pairs.table.PairTable`.

    Attributes:
        pairs: The table. A subclass sets it.
        sensors: Sensors of a sample.
        bands: Names of the channels of 'image'.
        transforms: Applied to each sample, last.
        on_error: What is done about a file that cannot be read.
        skipped: The files left out, by reason.
    """

    all_bands = BANDS
    rgb_bands = RGB_BANDS
    cmap = 'tab20'

    pairs: PairTable
    sensors: tuple[str, ...]
    bands: tuple[str, ...]

    def __init__(
        self, transforms: Callable[[Sample], Sample] | None = None, on_error: OnError = 'raise'
    ) -> None:
        """Initialize a new PairDataset instance.

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

    def __and__(self, other: GeoDataset) -> PairIntersection:
        """Join the pairs with another data set, such as a raster of labels.

        Args:
            other: A RasterDataset or VectorDataset.

        Returns:
            Both, read on the grid of each pair.

        Raises:
            RuntimeError: If the data sets have no ground or no time in common.
            TypeError: If *other* is neither a RasterDataset nor a VectorDataset.
        """
        return PairIntersection(self, other)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def index(self) -> gpd.GeoDataFrame:
        """One row a pair, sorted by season, ROI, patch and time step.

        It is made when it is first asked for, as TorchGeo's samplers do, and is not needed to read
        pairs. Columns as in :meth:`geofm.datasets.pairs.table.PairTable.frame`: the geometry is the
        outline of the S2 file, the interval reaches from the earlier to the later of both days. To
        change it, set another one: its rows are then the pairs.
        """
        if self._frame is None:
            self._frame = self.pairs.frame(self._crs)
        return self._frame

    @index.setter
    def index(self, frame: gpd.GeoDataFrame) -> None:
        self.pairs = PairTable.of_frame(frame)
        self._frame, self._is_set = frame, True
        self._search_in(frame.crs)

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of the index. Pairs are read in their own, whatever this is."""
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
        """Bounds of all pairs: x, y and time."""
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
        """Number of pairs that could not be read and were replaced, by all processes that read."""
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
            index: Number of the pair, 'index' of the sample.

        Returns:
            The files of its sensors.

        Raises:
            IndexError: If there is no such pair.
        """
        position = self._position(index)
        paths = [self.pairs.path(position, sensor) for sensor in self.sensors]
        return [Path(path) for path in paths if path is not None]

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Size of a pair.

        Args:
            index: Number of the pair.

        Returns:
            Height and width in pixels.
        """
        record = self.pairs.records[self._position(index)]
        return int(record['height']), int(record['width'])

    def __getitem__(self, index: SupportsIndex | GeoSlice) -> Sample:
        """Read a pair by its number or by place and time.

        Among the pairs that a slice touches in space and time, the one is read that it overlaps
        most in space; of several (the time steps of a patch) the one whose interval is most
        like the slice's (intersection over union); of several still, the first in the index. So
        the bounds and interval of a row of the index give its own patch, whole.

        The box is projected into the CRS of that patch and read as a window of the nearest whole
        number of pixels (one at least), placed at the nearest pixel and clipped to the patch:
        nothing is resampled. A box of k x k pixels gives k x k in patches in EPSG:4326, and fewer
        or more in a patch in UTM, whose pixels are not squares of degrees.

        Args:
            index: Number of the pair, or [xmin:xmax, ymin:ymax, tmin:tmax] in the CRS of the
                dataset. Of longitudes, xmax may be beyond 180, or less than xmin: the box then
                crosses 180 degrees.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            IndexError: If there is no such pair.
            ValueError: If the slice has a step that is not the resolution of the dataset, or a
                file cannot be read.
        """
        if isinstance(index, SupportsIndex):
            return self.read_pair(self._position(index))
        x, y, t = self._complete(index)
        for axis, given, own in (('x', x.step, self.res[0]), ('y', y.step, self.res[1])):
            if given is not None and given != own:
                raise ValueError(
                    f'{axis} step {given} asks for resampling, but patches are read on their own '
                    f'grid: leave the step away and resample the sample'
                )
        box = (x.start, y.start, x.stop, y.stop)
        when = pd.Timestamp(t.start), pd.Timestamp(t.stop)
        position = best_pair(self._searched(), box, *when)
        if position is None:
            raise IndexError(f'index: {index} not found in dataset with bounds: {self.bounds}')
        return self.read_pair(position, self._window(position, box))

    def read_pair(self, position: int, window: Window | None = None) -> Sample:
        """Read a pair, or a window of it, on the grid of its S2 file.

        Args:
            position: Number of the pair, a row of the index.
            window: Window of the S2 file, in whole pixels; all of it by default.

        Returns:
            A dictionary of tensors:

            * image: float32 (C, H, W), S1 in dB and S2 in DN, channels as in :attr:`bands`
            * valid: bool (H, W), True where both sensors have data, by the rule of
              :mod:`geofm.validity` and the masks of the files. Values elsewhere mean nothing and
              may be NaN.
            * dates: int64 (2,), the days of S1 and S2 since 1970-01-01
            * bounds: float64 (4,), left, bottom, right, top in the CRS of the patch
            * transform: float64 (6,), affine coefficients a, b, c, d, e, f
            * crs: int64 (), EPSG code
            * index: int64 (), number of the pair that was read, for :meth:`files_of`

        Raises:
            IndexError: If there is no such pair.
            ValueError: If the window is not inside the patch or too large, or a file cannot be
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
        """Another pair of the same size, drawn at random."""
        records = self.pairs.records
        like = np.flatnonzero(
            (records['height'] == records['height'][position])
            & (records['width'] == records['width'][position])
        )
        return int(like[int(torch.randint(len(like), ()))])

    def read_or_raise(self, position: int, window: Window | None = None) -> Sample:
        """Read this pair and no other, whatever is to be done about errors.

        Args:
            position: Number of the pair.
            window: As of :meth:`read_pair`.

        Returns:
            The sample, see :meth:`read_pair`.

        Raises:
            BrokenFileError: If a file cannot be read; a ValueError.
            ValueError: If the window is not inside the patch, or too large.
        """
        grid, epsg = self.pairs.grid(position)
        paths = {sensor: self.pairs.path(position, sensor) for sensor in self.sensors}
        # S2, where it is read, gives the grid.
        main = max(paths)
        is_whole = window is None
        if window is None:
            window = Window(0, 0, grid.width, grid.height)
        elif not _is_inside(window, grid):
            raise ValueError(
                f'{paths[main]}: {window} is not made of whole pixels inside {grid.height} rows '
                f'and {grid.width} columns'
            )
        else:
            col, first_row, width, height = (int(v) for v in window.flatten())
            grid = grid.crop(first_row, col, height, width)
        if len(self.bands) * grid.height * grid.width > MOST_VALUES:
            raise ValueError(
                f'{paths[main]}: {grid.height} x {grid.width} pixels of {len(self.bands)} bands '
                f'are too many to read at once: read windows (patch_size of the data module)'
            )
        image = np.empty((len(self.bands), *grid.shape), dtype=np.float32)
        valid = np.ones(grid.shape, dtype=bool)
        for key, path in paths.items():
            assert path is not None
            names, channels = _channels(self.bands, key)
            target = image[channels]
            read_file(
                path, names, SENSORS[key], epsg, grid, window, (target, valid), may_warp=key != main
            )
            if not isinstance(channels, slice):
                image[channels] = target
        if is_whole and not valid.any():
            # A window may well lie in a gap, a patch that the scan found sound may not.
            for key, path in paths.items():
                refuse_empty(str(path), SENSORS[key], epsg, grid, window)
        sample: Sample = {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(valid),
            'dates': torch.from_numpy(self.pairs.days(position)),
            'bounds': torch.tensor(tuple(grid.bounds), dtype=torch.float64),
            'transform': torch.tensor(tuple(grid.transform)[:6], dtype=torch.float64),
            'crs': torch.tensor(epsg),
            'index': torch.tensor(position),
        }
        return sample if self.transforms is None else self.transforms(sample)

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
        """Number of a pair, counted from the start."""
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f'pair {position} of {len(self)}: out of range')
        return position % len(self)

    def _complete(self, index: GeoSlice) -> tuple[slice, slice, slice]:
        """Slices with every start and stop given."""
        if isinstance(index, tuple) and len(index) == 3:
            x, y, t = index
            if None not in (x.start, x.stop, y.start, y.stop, t.start, t.stop):
                return x, y, t
        # Only here: to find the bounds of the dataset takes time in proportion to its size.
        return self._disambiguate_slice(index)

    def _searched(self) -> TableSearch | FrameSearch:
        """The search among all pairs, made when it is first needed."""
        if self._search is None:
            frame = self._frame if self._is_set else None
            self._search = (
                TableSearch(self.pairs, self._crs) if frame is None else FrameSearch(frame)
            )
        return self._search

    def _window(self, position: int, box: tuple[float, float, float, float]) -> Window:
        """Window of a patch that a box in the CRS of the dataset overlaps."""
        grid, _ = self.pairs.grid(position)
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


def _is_inside(window: Window, grid: Grid) -> bool:
    """Whether a window is one or more whole pixels of a grid."""
    col, row, width, height = window.flatten()
    return (
        all(float(v).is_integer() for v in (col, row, width, height))
        and 0 <= col < col + width <= grid.width
        and 0 <= row < row + height <= grid.height
    )
