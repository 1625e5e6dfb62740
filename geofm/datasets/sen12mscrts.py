"""SEN12MS-CR-TS: pairs of Sentinel-1 and Sentinel-2 patches, each read on its own grid."""

import os
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import get_spawning_popen
from pathlib import Path as FilePath
from typing import Any, Literal, SupportsIndex, get_args

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import torch
from matplotlib.figure import Figure
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import Window
from torchgeo.datasets import DatasetNotFoundError, GeoDataset
from torchgeo.datasets.utils import GeoSlice, Path, Sample

from geofm.datasets.failures import FailureLog
from geofm.datasets.footprints import SEARCH_CRS
from geofm.datasets.listing import Listing, list_scenes, sound
from geofm.datasets.memory import give_back
from geofm.datasets.pair_table import Draft, PairTable, Period
from geofm.datasets.pairing import AnyPairing, Pairing, Rows, pair_scenes
from geofm.datasets.plot import plot_pair
from geofm.datasets.reading import BrokenFileError, read_file, refuse_empty
from geofm.datasets.regions import REGIONS, Roi, Split, split_of
from geofm.datasets.scan import Reason, Skipped
from geofm.datasets.scenes import Scenes
from geofm.datasets.search import FrameSearch, TableSearch, best_pair
from geofm.grid import Grid
from geofm.sensors import BANDS, RGB_BANDS, SENSORS, BandError, band_indices, check_bands

#: Pixel size of the data set in degrees, along both axes.
PIXEL_SIZE = 8.983152841195215e-05

#: What to do about a file that cannot be read any more.
OnError = Literal['raise', 'skip']

#: Pairs that are tried in place of one that cannot be read, before that is an error all the same.
MOST_SKIPPED = 10


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
    names that say nothing, and bad files of all kinds, see
    :class:`geofm.datasets.inspection.Problem`.

    Every folder has a catalogue of its files, see :mod:`geofm.datasets.catalogue`, beside the data
    or, if these are read-only, in the user's cache. It is made when the folder is first opened, as
    ``geofm index`` does, and files that it marks as bad are left out. Of folders of fewer than
    :data:`geofm.datasets.catalogue.SMALL` files it is brought up to date each time; of larger ones
    no file is opened, and a catalogue that is older than the data is used with a warning.

    Every patch is read on the grid of its S2 file, whatever CRS the other patches have, so its
    pixels are those of the file, bit for bit. S1 is warped (bilinear, in dB) only where its own
    grid is another one. Interpolating decibels rather than power keeps the statistics of
    the speckle that the normalisation is made for, and one bright scatterer from spreading.

    Splits are by ROI, after the official lists.

    If you use this dataset in your research, please cite the following paper:

    * https://doi.org/10.1109/TGRS.2022.3146246

    The pairs are kept in arrays that worker processes share, see
    :class:`geofm.datasets.pair_table.PairTable`.

    Attributes:
        skipped: The files left out, by reason.
        bands: Names of the channels of 'image'.
        split: The split.
    """

    all_bands = BANDS
    rgb_bands = RGB_BANDS
    cmap = 'tab20'
    filename_glob = '*.tif'
    _res = (PIXEL_SIZE, PIXEL_SIZE)
    #: First and last day of all pairs, if names do not say when they were taken.
    _period: Period | None = None

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
        catalogue: Path | None = None,
    ) -> None:
        """Initialize a new SEN12MSCRTS instance.

        Args:
            paths: Folders to search, or files; or a list of pairs ``[[s1, s2], ...]`` in a file
                ``.json``, as of ``geofm index --pairs-json``, with paths relative to that file
                or absolute; or a catalogue ``.parquet`` of ``geofm index --output``.
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
            catalogue: Catalogue of the folder *paths*, if it does not lie beside the data or in
                the user's cache.

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
        self.catalogue = catalogue
        self._failures = FailureLog() if on_error == 'skip' else None
        self.skipped = Skipped()
        self._frame: gpd.GeoDataFrame | None = None
        self._is_set = False
        self._search_in(SEARCH_CRS)
        self.pairs = self._scan()
        give_back()

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy or a worker, which make the index and the search again if need be."""
        state = {**self.__dict__, '_search': None}
        if not self._is_set:
            state['_frame'] = None
        if get_spawning_popen() is not None:
            # A worker reads, and what was left out may be many names.
            state['skipped'] = Skipped()
        return state

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def index(self) -> gpd.GeoDataFrame:
        """One row a pair, sorted by season, ROI, patch and time step.

        It is made when it is first asked for, as TorchGeo's samplers do, and is not needed to read
        pairs. Columns as in :meth:`geofm.datasets.pair_table.PairTable.frame`: the geometry is the
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

    @property
    def bounds(self) -> tuple[slice, slice, slice]:
        """Bounds of all pairs: x, y and time."""
        left, bottom, right, top = self._searched().bounds
        start, stop = self._searched().spans(np.arange(len(self)))
        x_res, y_res = self.res
        return (
            slice(left, right, x_res),
            slice(bottom, top, y_res),
            slice(pd.Timestamp(start.min()), pd.Timestamp(stop.max()), 1),
        )

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

    def files_of(self, index: SupportsIndex) -> list[FilePath]:
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
        return [FilePath(path) for path in paths if path is not None]

    def shape_of(self, index: SupportsIndex) -> tuple[int, int]:
        """Size of a pair.

        Args:
            index: Number of the pair.

        Returns:
            Height and width in pixels.
        """
        record = self.pairs.records[self._position(index)]
        return int(record['height']), int(record['width'])

    @property
    def unpaired(self) -> int:
        """Number of S1 files without S2 and S2 files without S1 that were left out."""
        return self.skipped.count(Reason.ONLY_S1, Reason.ONLY_S2)

    def _keeps(self, roi: Roi) -> bool:
        """Whether a ROI is in the split and the regions asked for."""
        in_split = self.split == 'all' or self._split_of(roi) == self.split
        return in_split and (
            self.regions is None or any(roi in REGIONS[region] for region in self.regions)
        )

    def _split_of(self, roi: Roi) -> str:
        """Split of a ROI."""
        return split_of(*roi)

    def _scan(self) -> PairTable:
        """Find the pairs."""
        draft, rois = self._draft()
        give_back()
        pairs = draft.complete(self.skipped, self._period)
        self.skipped.warn()
        if not rois:
            raise DatasetNotFoundError(self)
        if not len(pairs):
            there = ', '.join(f'{roi[0]}/{roi[1]} ({self._split_of(roi)})' for roi in rois)
            raise EmptySplitError(
                f"{self.paths}: no pair for split='{self.split}'{self._filters()}; ROIs there: "
                f'{there}' + (f'; files left out: {self.skipped}' if self.skipped else '')
            )
        return pairs

    def _draft(self) -> tuple[Draft, list[Roi]]:
        """The pairs, by the names of the files, and all ROIs that there are."""
        listing = list_scenes(self.paths, self.catalogue)
        scenes = listing.scenes
        rows = listing.rows(dated=self._period is None)
        codes = scenes.season[rows].astype(np.int64) << 32 | scenes.roi[rows]
        there = np.unique(codes)
        rois = [(scenes.seasons[code >> 32], code & 0xFFFFFFFF) for code in there.tolist()]
        rows = rows[np.isin(codes, there[[self._keeps(roi) for roi in rois]])]
        listing.note_bad(rows, self.skipped)
        return Draft.of(scenes, self._filter(scenes, self._pair(listing, rows))), rois

    def _pair(self, listing: Listing, kept: Rows) -> dict[str, Rows]:
        """Files of each pair, by sensor."""
        if listing.pairs is None:
            return pair_scenes(listing.scenes, kept, self.sensors, self._pairing, self.skipped)
        if len(self.sensors) == 1:
            raise ValueError(f'{self.paths}: lists pairs, but sensors are only {self.sensors}')
        in_kept = np.isin(listing.pairs['s2'], kept)
        pairs = {sensor: files[in_kept] for sensor, files in listing.pairs.items()}
        return sound(listing.scenes, pairs)

    @property
    def _pairing(self) -> AnyPairing:
        """How files are paired."""
        return self.pairing

    def _filter(self, scenes: Scenes, files: dict[str, Rows]) -> dict[str, Rows]:
        """The pairs whose days and clouds are as asked for."""
        days = {s: scenes.day[rows].astype(np.int64) for s, rows in files.items()}
        kept = np.ones(len(files[max(files)]), bool)
        if self.max_day_gap is not None and len(days) == 2:
            kept &= np.abs(days['s1'] - days['s2']) <= self.max_day_gap
        if self.dates is not None:
            first, last = (int(day.astype(np.int64)) for day in self.dates)
            for day in days.values():
                kept &= (day >= first) & (day <= last)
        if self.max_cloud_cover is not None:
            if np.isnan(scenes.cloud_cover).all():
                raise ValueError(
                    f"{self.paths}: cloud cover is not known; 'geofm index --clouds' works it out"
                )
            kept &= scenes.cloud_cover[files['s2']] <= self.max_cloud_cover
        return {sensor: rows[kept] for sensor, rows in files.items()}

    def _filters(self) -> str:
        """The filters that are set, for an error."""
        given = {
            'regions': self.regions and list(self.regions),
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
            * valid: bool (H, W), True where both sensors have data: S1 finite, S2 not nodata, and
              neither of them 0 in all bands, which is how the data set fills gaps. Values
              elsewhere mean nothing and may be NaN.
            * dates: int64 (2,), the days of S1 and S2 since 1970-01-01
            * bounds: float64 (4,), left, bottom, right, top in the CRS of the patch
            * transform: float64 (6,), affine coefficients a, b, c, d, e, f
            * crs: int64 (), EPSG code
            * index: int64 (), number of the pair that was read, for :meth:`files_of`

        Raises:
            IndexError: If there is no such pair.
            ValueError: If the window is not inside the patch, or a file cannot be read.
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
            ValueError: If the window is not inside the patch.
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
        counts = [len(SENSORS[sensor].bands) for sensor in self.sensors]
        image = np.empty((sum(counts), *grid.shape), dtype=np.float32)
        valid = np.ones(grid.shape, dtype=bool)
        first = 0
        for (sensor, path), count in zip(paths.items(), counts, strict=True):
            assert path is not None
            target = image[first : first + count], valid
            read_file(path, sensor, epsg, grid, window, target, may_warp=sensor != main)
            first += count
        if is_whole and not valid.any():
            # A window may well lie in a gap, a patch that the scan found sound may not.
            for sensor, path in paths.items():
                refuse_empty(str(path), sensor, epsg, grid, window)
        available = [band for sensor in self.sensors for band in SENSORS[sensor].band_names]
        if list(self.bands) != available:
            image = image[band_indices(self.bands, available)]
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
        # Only here: the bounds of the dataset take time in proportion to its size.
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
