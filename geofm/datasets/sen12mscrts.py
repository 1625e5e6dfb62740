"""SEN12MS-CR-TS: pairs of Sentinel-1 and Sentinel-2 patches, each read on its own grid."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, Literal, SupportsIndex, get_args

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
import shapely
import torch
from matplotlib.figure import Figure
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from torchgeo.datasets import DatasetNotFoundError, GeoDataset
from torchgeo.datasets.utils import GeoSlice, Path, Sample

from geofm.datasets.catalogue import KEY
from geofm.datasets.listing import Listing, list_scenes
from geofm.datasets.pairing import Pairing, pair_scenes
from geofm.datasets.plot import plot_pair
from geofm.datasets.regions import REGIONS, Roi, Split, split_of
from geofm.datasets.scan import Reason, Skipped
from geofm.datasets.tiff_header import NotPlainError, parse_header, read_window
from geofm.grid import Grid, read_on_grid
from geofm.sensors import BANDS, RGB_BANDS, SENSORS, BandError, band_indices, check_bands

#: Pixel size of the data set in degrees, along both axes.
PIXEL_SIZE = 8.983152841195215e-05

#: What to do about a file that cannot be read any more.
OnError = Literal['raise', 'skip']

#: Pairs that are tried in place of one that cannot be read, before that is an error all the same.
MOST_SKIPPED = 10

#: Areas of overlap closer than this, relative to the larger, count as equal.
_AREA_TOLERANCE = 1e-6


class BrokenFileError(ValueError):
    """A file that the index has cannot be read any more."""


class EmptySplitError(ValueError):
    """The tree holds no pair of the split and regions asked for."""


class SEN12MSCRTS(GeoDataset):
    """SEN12MS-CR-TS: co-registered Sentinel-1 and Sentinel-2 time series.

    `SEN12MS-CR-TS <https://patricktum.github.io/cloud_removal/sen12mscrts/>`__ has 53 regions of
    interest (ROIs) around the world, 30 time steps of 2018 each, as patches of 256 x 256 pixels:
    Sentinel-1 GRD (VV, VH, dB, float32) and Sentinel-2 Level-1C (13 bands, DN = reflectance x
    10,000, uint16). The dates of S1 and S2 in a time step differ by some days. About half of
    the S2 observations are cloudy.

    Files lie as in
    ``ROIs2017/32/S1/4/s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif`` and
    ``ROIs2017/32/S2/4/s2_ROIs2017_32_ImgNo_4_2018-02-24_patch_12.tif``. An S1 and an S2 file are
    a pair if their names have season, ROI, patch and time step in common; folders are not looked
    at. Files that make no pair are left out, counted in :attr:`skipped` and reported in one
    warning: S1 without S2 and the reverse, two files for one place (none of them is used),
    names that say nothing, files that cannot be opened, have a wrong number of bands or no EPSG
    code.

    A folder may have a catalogue of its files, see :mod:`geofm.datasets.catalogue`, that ``geofm
    index`` makes beside the data, or in the user's cache if the data are read-only. It is used
    wherever there is one: no file is opened then, and files that it marks as bad are left out. A
    catalogue that is older than the data is used with a warning. A folder of
    :data:`geofm.datasets.listing.CATALOGUE_FROM` files or more gets a catalogue if it has none; of
    smaller ones the headers are read each time.

    Every patch is read on the grid of its S2 file, whatever CRS the other patches have, so its
    pixels are those of the file, bit for bit. S1 is warped (bilinear, in dB) only where its own
    grid is another one. Interpolating decibels rather than power keeps the statistics of
    the speckle that the normalisation is made for, and one bright scatterer from spreading.

    Splits are by ROI, after the official lists.

    If you use this dataset in your research, please cite the following paper:

    * https://doi.org/10.1109/TGRS.2022.3146246

    Attributes:
        index: One row a pair, sorted by season, ROI, patch and time step; the geometry is the
            outline of the S2 file in EPSG:4326, the interval reaches from the earlier to the
            later of both days. Columns as in :func:`geofm.datasets.scan.scan_headers`.
        skipped: The files left out, by reason.
        bands: Names of the channels of 'image'.
        split: The split.
        failures: Number of pairs that could not be read and were replaced by others, in this
            process and in those that read for it; only with ``on_error='skip'``.
    """

    all_bands = BANDS
    rgb_bands = RGB_BANDS
    cmap = 'tab20'
    filename_glob = '*.tif'
    _res = (PIXEL_SIZE, PIXEL_SIZE)

    def __init__(
        self,
        paths: Path | Iterable[Path],
        split: Split = 'train',
        regions: Sequence[str] | None = None,
        bands: Sequence[str] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        sensors: Sequence[str] = ('s1', 's2'),
        pairing: Pairing = 'time_step',
        max_day_gap: int | None = None,
        max_cloud_cover: float | None = None,
        dates: tuple[str, str] | None = None,
        on_error: OnError = 'raise',
    ) -> None:
        """Initialize a new SEN12MSCRTS instance.

        Args:
            paths: Folders to search, or files; or a list of pairs ``[[s1, s2], ...]`` in a file
                ``.json``, as of ``geofm index --pairs-json``, with paths relative to that file
                or absolute.
            split: One of 'train', 'val', 'test' or 'all'. ROIs that are not on the official
                lists are in 'train'.
            regions: World regions to keep: 'africa', 'america', 'asiaEast', 'asiaWest',
                'europa'. Default: all, and ROIs that are not on the official list.
            bands: Names of the bands to return, in the order to return them; all bands of the
                sensors by default.
            transforms: Applied to each sample, last.
            sensors: 's1' and 's2', or one of them. A sample of one sensor needs no partner; its
                date of the other is missing.
            pairing: 'time_step': S1 and S2 of the same time step; 'nearest': each S2 with the S1
                of the same patch that is nearest in time, whatever its time step.
            max_day_gap: Most days between S1 and S2.
            max_cloud_cover: Largest share, 0 to 1, of S2 that clouds may cover. It must be known:
                ``geofm index --clouds`` works it out. An S2 whose cover is unknown is left out.
            dates: First and last day, e.g. ('2018-03-01', '2018-05-31'), within which the
                acquisitions must lie.
            on_error: What to do if a file cannot be read: 'raise' an error that names it; or
                'skip' the pair: read another one of the same size in its place, drawn at random
                from PyTorch's generator, and count that in :attr:`failures`.

        Raises:
            BandError: If a band is unknown, given twice, or not of the sensors.
            DatasetNotFoundError: If no S1 or S2 file is found.
            EmptySplitError: If there are files, but no pair for *split* and *regions*; a
                ValueError.
            ValueError: If *split*, a region or another name is unknown, an argument is out of
                range, cloud cover is asked for and not known, or a catalogue or list of pairs
                cannot be used.
        """
        if split not in get_args(Split):
            raise ValueError(f"unknown split '{split}': choose from {list(get_args(Split))}")
        unknown = [region for region in regions or () if region not in REGIONS]
        if unknown or isinstance(regions, str):
            raise ValueError(f'regions {regions!r} must be a list of names from {list(REGIONS)}')
        self.paths = paths if isinstance(paths, str | os.PathLike) else list(paths)
        self.split = split
        self.regions = None if regions is None else tuple(regions)
        self.sensors = _check_sensors(sensors)
        self.bands = _bands_of(self.sensors, bands)
        self.transforms = transforms
        for name, value, known in (
            ('pairing', pairing, get_args(Pairing)),
            ('on_error', on_error, get_args(OnError)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose from {list(known)}")
        if max_day_gap is not None and max_day_gap < 0:
            raise ValueError(f'max_day_gap must be 0 days or more, not {max_day_gap}')
        if max_cloud_cover is not None and not 0 <= max_cloud_cover <= 1:
            raise ValueError(f'max_cloud_cover must be from 0 to 1, not {max_cloud_cover}')
        if max_cloud_cover is not None and 's2' not in self.sensors:
            raise ValueError("max_cloud_cover is of S2, but sensors are only 's1'")
        self.pairing = pairing
        self.max_day_gap = max_day_gap
        self.max_cloud_cover = max_cloud_cover
        self.dates = None if dates is None else _check_dates(dates)
        self.on_error = on_error
        # Shared with the processes that read.
        self._failures = torch.zeros((), dtype=torch.int64).share_memory_()
        self.skipped = Skipped()
        self.index = self._scan()

    @property
    def failures(self) -> int:
        """Number of pairs that could not be read and were replaced by others."""
        return int(self._failures)

    @property
    def unpaired(self) -> int:
        """Number of S1 files without S2 and S2 files without S1 that were left out."""
        return self.skipped.count(Reason.ONLY_S1, Reason.ONLY_S2)

    def _keeps(self, roi: Roi) -> bool:
        """Whether a ROI is in the split and the regions asked for."""
        in_split = self.split == 'all' or split_of(*roi) == self.split
        return in_split and (
            self.regions is None or any(roi in REGIONS[region] for region in self.regions)
        )

    def _scan(self) -> gpd.GeoDataFrame:
        """Find the pairs. Without a catalogue, only files of ROIs that are kept are opened."""
        listing = list_scenes(self.paths, lambda: self.files, self.skipped)
        scenes = listing.scenes
        rois = scenes.groupby(['season', 'roi'], sort=True)
        there: list[Roi] = list(rois.groups)  # type: ignore[arg-type]
        keeps = np.array([self._keeps(roi) for roi in there], dtype=bool)
        in_kept = keeps[rois.ngroup()]
        rows = listing.describe(self._filter(self._pair(listing, in_kept), listing), self.skipped)
        self.skipped.warn()
        if scenes.empty:
            raise DatasetNotFoundError(self)
        if rows.empty:
            names = ', '.join(f'{roi[0]}/{roi[1]} ({split_of(*roi)})' for roi in there)
            raise EmptySplitError(
                f"{self.paths}: no pair for split='{self.split}' and regions="
                f'{self.regions and list(self.regions)}{self._filters()}; ROIs there: {names}'
                + (f'; files left out: {self.skipped}' if self.skipped else '')
            )
        dates = rows[[f'{sensor}_date' for sensor in self.sensors]]
        # A date means the whole day, to its last microsecond, as in TorchGeo.
        last = pd.Timedelta(days=1) - pd.Timedelta(microseconds=1)
        intervals = pd.IntervalIndex.from_arrays(
            dates.min(axis=1), dates.max(axis=1) + last, closed='both', name='datetime'
        )
        return gpd.GeoDataFrame(rows.set_index(intervals), geometry='geometry', crs='EPSG:4326')

    def _pair(self, listing: Listing, kept: npt.NDArray[np.bool_]) -> pd.DataFrame:
        """Rows of the scenes of each pair."""
        if listing.pairs is None:
            return pair_scenes(listing.scenes[kept], self.sensors, self.pairing, self.skipped)
        if len(self.sensors) == 1:
            raise ValueError(f'{self.paths}: lists pairs, but sensors are only {self.sensors}')
        pairs = listing.pairs[kept[listing.pairs['s2']]]
        order = listing.scenes.loc[pairs['s2'], KEY].sort_values(KEY).index
        return pairs.set_index('s2', drop=False).loc[order].reset_index(drop=True)

    def _filter(self, pairs: pd.DataFrame, listing: Listing) -> pd.DataFrame:
        """The pairs whose days and clouds are as asked for."""
        days = {sensor: listing.scenes['date'].to_numpy()[pairs[sensor]] for sensor in self.sensors}
        kept = np.ones(len(pairs), bool)
        if self.max_day_gap is not None and len(days) == 2:
            gaps = np.abs(days['s1'] - days['s2'])
            kept &= gaps <= np.timedelta64(self.max_day_gap, 'D')
        if self.dates is not None:
            for day in days.values():
                kept &= (day >= self.dates[0]) & (day <= self.dates[1])
        if self.max_cloud_cover is not None:
            kept &= self._cloud_cover(pairs, listing) <= self.max_cloud_cover
        return pairs[kept].reset_index(drop=True)

    def _cloud_cover(self, pairs: pd.DataFrame, listing: Listing) -> npt.NDArray[np.float32]:
        """Cloud cover of the S2 of each pair."""
        scenes = listing.scenes
        if 'cloud_cover' not in scenes or scenes['cloud_cover'].isna().all():
            raise ValueError(
                f"{self.paths}: cloud cover is not known; 'geofm index --clouds' works it out"
            )
        return scenes['cloud_cover'].to_numpy()[pairs['s2']]

    def _filters(self) -> str:
        """The filters that are set, for an error."""
        given = {
            'max_day_gap': self.max_day_gap,
            'max_cloud_cover': self.max_cloud_cover,
            'dates': self.dates and [str(day) for day in self.dates],
        }
        return ''.join(f', {name}={value}' for name, value in given.items() if value is not None)

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
                dataset.

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
        position = self._find(box, pd.Timestamp(t.start), pd.Timestamp(t.stop))
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
            * valid: bool (H, W), True where both sensors have data: S1 finite, S2 not nodata, and
              neither of them 0 in all bands, which is how the data set fills gaps. Values
              elsewhere mean nothing and may be NaN.
            * dates: int64 (2,), the days of S1 and S2 since 1970-01-01
            * bounds: float64 (4,), left, bottom, right, top in the CRS of the patch
            * transform: float64 (6,), affine coefficients a, b, c, d, e, f
            * crs: int64 (), EPSG code

        Raises:
            IndexError: If there is no such pair.
            ValueError: If the window is not inside the patch, or a file cannot be read.
        """
        position = self._position(position)
        for _ in range(MOST_SKIPPED if self.on_error == 'skip' else 0):
            try:
                return self._read_pair(position, window)
            except BrokenFileError:
                self._failures += 1
                position = self._another(position)
        return self._read_pair(position, window)

    def _another(self, position: int) -> int:
        """Another pair of the same size, drawn at random."""
        sizes = self.index[['height', 'width']].to_numpy()
        like = np.flatnonzero((sizes == sizes[position]).all(axis=1))
        return int(like[int(torch.randint(len(like), ()))])

    def _read_pair(self, position: int, window: Window | None) -> Sample:
        """Read a pair or a window of it."""
        row = self.index.iloc[position]
        grid = _grid_of(row)
        if window is None:
            window = Window(0, 0, grid.width, grid.height)
        elif not _is_inside(window, grid):
            raise ValueError(
                f'{row.s2}: {window} is not made of whole pixels inside {grid.height} rows and '
                f'{grid.width} columns'
            )
        else:
            col, first_row, width, height = (int(v) for v in window.flatten())
            grid = grid.crop(first_row, col, height, width)
        counts = [len(SENSORS[sensor].bands) for sensor in self.sensors]
        image = np.empty((sum(counts), *grid.shape), dtype=np.float32)
        valid = np.ones(grid.shape, dtype=bool)
        first = 0
        for sensor, count in zip(self.sensors, counts, strict=True):
            _read(
                row[sensor],
                sensor,
                int(row.epsg),
                grid,
                window,
                (image[first : first + count], valid),
            )
            first += count
        available = [band for sensor in self.sensors for band in SENSORS[sensor].band_names]
        if list(self.bands) != available:
            image = image[band_indices(self.bands, available)]
        # Through NumPy's own type: a missing date stays one, as the smallest integer.
        dates = np.array([row.s1_date.to_datetime64(), row.s2_date.to_datetime64()])
        sample: Sample = {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(valid),
            'dates': torch.from_numpy(dates.astype('datetime64[D]').astype(np.int64)),
            'bounds': torch.tensor(tuple(grid.bounds), dtype=torch.float64),
            'transform': torch.tensor(tuple(grid.transform)[:6], dtype=torch.float64),
            'crs': torch.tensor(int(row.epsg)),
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
        # Only here: the bounds of the dataset take time in proportion to its size.
        return self._disambiguate_slice(index)

    def _find(
        self, box: tuple[float, float, float, float], start: pd.Timestamp, stop: pd.Timestamp
    ) -> int | None:
        """Number of the pair that best answers a query, if any does."""
        query = shapely.box(*box)
        near = np.sort(self.index.sindex.query(query, predicate='intersects'))
        spans = self.index.index[near]
        near = near[(spans.left <= stop) & (spans.right >= start) & (start <= stop)]
        shapes = self.index.geometry.array[near].to_numpy()
        areas = shapely.area(shapely.intersection(shapes, query))
        if not areas.any():
            return None
        near = near[areas >= areas.max() * (1 - _AREA_TOLERANCE)]
        spans = self.index.index[near]
        first, last = start.to_datetime64(), stop.to_datetime64()
        shared = np.minimum(spans.right, last) - np.maximum(spans.left, first)
        joint = np.maximum(spans.right, last) - np.minimum(spans.left, first)
        return int(near[np.argmax(shared / joint)])

    def _window(self, position: int, box: tuple[float, float, float, float]) -> Window:
        """Window of a patch that a box in the CRS of the dataset overlaps."""
        grid = _grid_of(self.index.iloc[position])
        crs = CRS.from_user_input(self.index.crs)
        left, bottom, right, top = (
            box if crs == grid.crs else transform_bounds(crs, grid.crs, *box, densify_pts=21)
        )
        rows, cols = grid.pixel_of([left, right, right, left], [top, top, bottom, bottom])
        row, height = _clip(rows.min(), rows.max(), grid.height)
        col, width = _clip(cols.min(), cols.max(), grid.width)
        return Window(col, row, width, height)


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


def _check_sensors(sensors: Sequence[str]) -> tuple[str, ...]:
    """Sensors in canonical order."""
    if isinstance(sensors, str) or not sensors or not set(sensors) <= set(SENSORS):
        raise ValueError(f'sensors {sensors!r} must be a list of names from {list(SENSORS)}')
    return tuple(sensor for sensor in SENSORS if sensor in sensors)


def _bands_of(sensors: Sequence[str], bands: Sequence[str] | None) -> tuple[str, ...]:
    """Bands to return, all of them of the sensors."""
    available = [band for sensor in sensors for band in SENSORS[sensor].band_names]
    bands = available if bands is None else check_bands(bands)
    others = [band for band in bands if band not in available]
    if others:
        raise BandError(f'bands {others} are not of the sensors {list(sensors)}: leave them out')
    return tuple(bands)


def _check_dates(dates: Sequence[str]) -> tuple[np.datetime64, np.datetime64]:
    """First and last day."""
    try:
        first, last = (np.datetime64(day, 'D') for day in dates)
    except ValueError as err:
        raise ValueError(f'dates must be a first and a last day, not {dates}: {err}') from err
    if not first <= last:
        raise ValueError(f'dates must be a first and a last day, but {first} is after {last}')
    return first, last


@lru_cache(maxsize=256)
def _crs(epsg: int) -> CRS:
    """CRS of an EPSG code."""
    return CRS.from_epsg(epsg)


def _grid_of(row: Any) -> Grid:
    """Grid of a pair, from its row of the index."""
    return Grid(_crs(int(row.epsg)), Affine(*row['transform']), int(row.height), int(row.width))


#: Where pixels go, (C, H, W), and where it is noted that they are not valid, (H, W).
type _Target = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]


def _read(path: str, sensor: str, epsg: int, grid: Grid, window: Window, target: _Target) -> None:
    """Read from a file, with an error that helps."""
    try:
        if not _read_plain(path, sensor, epsg, grid, window, target):
            with rasterio.open(path) as src:
                _READERS[sensor](src, grid, window, target)
    except (RasterioError, OSError) as err:
        raise BrokenFileError(
            f'{path}: cannot be read ({err.__cause__ or err}); fetch the file again, or delete it '
            f'and make the dataset anew, which then leaves the pair out'
        ) from err


def _read_plain(
    path: str, sensor: str, epsg: int, grid: Grid, window: Window, target: _Target
) -> bool:
    """Read from a file whose pixels lie there as they are, on the very grid; False for others.

    Such are the files of the data set, and this takes less time than GDAL does.
    """
    col, row, width, height = (int(v) for v in window.flatten())
    with FilePath(path).open('rb', buffering=0) as file:
        try:
            header = parse_header(file.fileno())
        except NotPlainError:
            return False
        t = Affine(*header.transform) @ Affine.translation(col, row)
        if (
            header.bands != len(target[0])
            or header.epsg != epsg
            or t != grid.transform
            or col + width > header.width
            or row + height > header.height
        ):
            return False
        pixels = read_window(path, header, file.fileno(), (col, row, width, height))
    if pixels is None:
        return False
    target[0][:] = np.moveaxis(pixels, -1, 0)
    _MARKERS[sensor](target, header.nodata)
    return True


def _read_s1(src: DatasetReader, grid: Grid, window: Window, target: _Target) -> None:
    """Backscatter in dB on a grid, warped if it must be."""
    image, valid = target
    image[:], s1_valid = _read_moved_s1(src, grid)
    valid &= s1_valid


def _mark_s1(target: _Target, nodata: float | None) -> None:
    """Note where backscatter in dB is not valid."""
    image, valid = target
    if not np.isfinite(image.sum()):
        valid &= np.isfinite(image).all(axis=0)
    if not image.all():
        valid &= (image != 0).any(axis=0)
    if nodata is not None and not np.isnan(nodata):
        valid &= (image != np.float32(nodata)).all(axis=0)


def _read_moved_s1(
    src: DatasetReader, grid: Grid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Backscatter in dB of a file on whatever grid, and where it is valid."""
    if grid.window_in(Grid.of(src)) is not None:
        pixels, valid = read_on_grid(src, grid)
        return pixels, valid & (pixels != 0).any(axis=0)
    if src.nodata is not None:
        return read_on_grid(src, grid)
    # Fill must be known before warping, or it would bleed into the pixels beside it. Only 0 in
    # both polarisations is fill, which is what the option of GDAL says.
    with WarpedVRT(
        src, src_nodata=0, nodata=float('nan'), dtype='float32', UNIFIED_SRC_NODATA='YES'
    ) as filled:
        return read_on_grid(filled, grid)


def _read_s2(src: DatasetReader, grid: Grid, window: Window, target: _Target) -> None:
    """DN of a window, which must still lie where the index says."""
    if grid.window_in(Grid.of(src)) != window:
        # GDAL would stretch what it finds to the window, or read other ground.
        raise OSError('its pixels no longer lie where they did when the files were scanned')
    src.read(window=window, out=target[0])
    _mark_s2(target, src.nodata)


def _mark_s2(target: _Target, nodata: float | None) -> None:
    """Note where DN are not valid."""
    image, valid = target
    # Most often the first band has no 0, and the others need not be looked at.
    if not image[0].all():
        valid &= (image != 0).any(axis=0)
    if nodata is not None and nodata != 0:
        # A single band may well be at the nodata value, B10 at 0 above all.
        valid &= (image != nodata).any(axis=0)


_READERS = {'s1': _read_s1, 's2': _read_s2}
_MARKERS = {'s1': _mark_s1, 's2': _mark_s2}
