"""SEN12MS-CR-TS: pairs of Sentinel-1 and Sentinel-2 patches, each read on its own grid."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, get_args

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

from geofm.datasets.plot import plot_pair
from geofm.datasets.regions import REGIONS, Roi, Split, split_of
from geofm.datasets.scan import (
    Reason,
    Skipped,
    complete_pairs,
    match_pairs,
    rois_of,
    scan_headers,
)
from geofm.grid import Grid, read_on_grid
from geofm.sensors import BANDS, RGB_BANDS, band_indices, check_bands

#: Pixel size of the data set in degrees, along both axes.
PIXEL_SIZE = 8.983152841195215e-05

#: Areas of overlap closer than this, relative to the larger, count as equal.
_AREA_TOLERANCE = 1e-6


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
        bands: Sequence[str] = BANDS,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Initialize a new SEN12MSCRTS instance.

        Args:
            paths: Folders to search, or files.
            split: One of 'train', 'val', 'test' or 'all'. ROIs that are not on the official
                lists are in 'train'.
            regions: World regions to keep: 'africa', 'america', 'asiaEast', 'asiaWest',
                'europa'. Default: all, and ROIs that are not on the official list.
            bands: Names of the bands to return, in the order to return them.
            transforms: Applied to each sample, last.

        Raises:
            BandError: If a band is unknown or given twice.
            DatasetNotFoundError: If no S1 or S2 file is found.
            EmptySplitError: If there are files, but no pair for *split* and *regions*; a
                ValueError.
            ValueError: If *split* or a region is unknown.
        """
        if split not in get_args(Split):
            raise ValueError(f"unknown split '{split}': choose from {list(get_args(Split))}")
        unknown = [region for region in regions or () if region not in REGIONS]
        if unknown or isinstance(regions, str):
            raise ValueError(f'regions {regions!r} must be a list of names from {list(REGIONS)}')
        self.paths = paths if isinstance(paths, str | os.PathLike) else list(paths)
        self.split = split
        self.regions = None if regions is None else tuple(regions)
        self.bands = check_bands(bands)
        self.transforms = transforms
        self.skipped = Skipped()
        self.index = self._scan()

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
        """Find the pairs. Only files of the ROIs that are kept are opened."""
        candidates = match_pairs(self.files, self.skipped)
        kept = {k: v for k, v in candidates.items() if self._keeps((k.season, k.roi))}
        rows = scan_headers(complete_pairs(kept, self.skipped), self.skipped)
        self.skipped.warn()
        if not candidates:
            raise DatasetNotFoundError(self)
        if rows.empty:
            there = ', '.join(
                f'{season}/{roi} ({split_of(season, roi)})' for season, roi in rois_of(candidates)
            )
            raise EmptySplitError(
                f"{self.paths}: no pair for split='{self.split}' and regions="
                f'{self.regions and list(self.regions)}; ROIs there: {there}'
                + (f'; files left out: {self.skipped}' if self.skipped else '')
            )
        dates = rows[['s1_date', 's2_date']]
        # A date means the whole day, to its last microsecond, as in TorchGeo.
        last = pd.Timedelta(days=1) - pd.Timedelta(microseconds=1)
        intervals = pd.IntervalIndex.from_arrays(
            dates.min(axis=1), dates.max(axis=1) + last, closed='both', name='datetime'
        )
        return gpd.GeoDataFrame(rows.set_index(intervals), geometry='geometry', crs='EPSG:4326')

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
        row = self.index.iloc[self._position(position)]
        grid = _grid_of(row)
        window = Window(0, 0, grid.width, grid.height) if window is None else window
        if not _is_inside(window, grid):
            raise ValueError(
                f'{row.s2}: {window} is not made of whole pixels inside {grid.height} rows and '
                f'{grid.width} columns'
            )
        col, first_row, width, height = (int(v) for v in window.flatten())
        grid = grid.crop(first_row, col, height, width)
        s1, s1_valid = _read(row.s1, lambda src: _read_s1(src, grid))
        s2, s2_valid = _read(row.s2, lambda src: _read_s2(src, window))
        image = np.concatenate((s1, s2))
        if self.bands != BANDS:
            image = image[band_indices(self.bands, BANDS)]
        # Through NumPy's own type: a missing date stays one, as the smallest integer.
        dates = np.array([row.s1_date.to_datetime64(), row.s2_date.to_datetime64()])
        sample: Sample = {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(s1_valid & s2_valid),
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


def _grid_of(row: Any) -> Grid:
    """Grid of the S2 file, from its row of the index."""
    return Grid(
        CRS.from_epsg(int(row.epsg)), Affine(*row['transform']), int(row.height), int(row.width)
    )


type _Pixels = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]


def _read(path: str, read: Callable[[DatasetReader], _Pixels]) -> _Pixels:
    """Open a file and read from it, with an error that helps."""
    try:
        with rasterio.open(path) as src:
            return read(src)
    except RasterioError as err:
        raise ValueError(
            f'{path}: cannot be read ({err.__cause__ or err}); fetch the file again, or delete it '
            f'and make the dataset anew, which then leaves the pair out'
        ) from err


def _read_s1(src: DatasetReader, grid: Grid) -> _Pixels:
    """Backscatter in dB on a grid, and where it is valid."""
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


def _read_s2(src: DatasetReader, window: Window) -> _Pixels:
    """DN of a window, and where they are valid."""
    pixels = src.read(window=window, out_dtype='float32')
    valid = np.isfinite(pixels).all(axis=0) & (pixels != 0).any(axis=0)
    if src.nodata is not None:
        # A single band may well be at the nodata value, B10 at 0 above all.
        valid &= (pixels != src.nodata).any(axis=0)
    return pixels, valid
