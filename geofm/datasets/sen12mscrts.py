"""SEN12MS-CR-TS: pairs of Sentinel-1 and Sentinel-2 patches."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import numpy as np
from torchgeo.datasets import DatasetNotFoundError
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.catalogue.scenes import Rows, Scenes
from geofm.datasets.pairs.dataset import EmptySplitError, MatchedDataset, OnError
from geofm.datasets.pairs.inputs import Listing, list_scenes, without_problems
from geofm.datasets.pairs.pairing import AnyPairing, Pairing, pair_scenes
from geofm.datasets.pairs.skipped import Reason
from geofm.datasets.pairs.table import MIN_OVERLAP, Draft, PairTable, Period, check_overlap
from geofm.datasets.splitting import Split
from geofm.printing import warn
from geofm.sen12ms import PIXEL_SIZE, REGIONS, Roi, split_of
from geofm.sensors import BANDS, SENSORS, BandError, check_bands, sensor_of

#: For each sensor, the bands that are not its own.
_NOT_OF = {
    key: [band for band in BANDS if band not in sensor.band_names]
    for key, sensor in SENSORS.items()
}


class SEN12MSCRTS(MatchedDataset):
    """SEN12MS-CR-TS: co-registered Sentinel-1 and Sentinel-2 time series.

    `SEN12MS-CR-TS <https://patricktum.github.io/cloud_removal/sen12mscrts/>`__ has 53 regions of
    interest (ROIs) around the world, 30 time steps of 2018 each, as patches of 256 x 256 pixels:
    Sentinel-1 GRD (VV, VH, dB, float32) and Sentinel-2 Level-1C (13 bands, DN = reflectance x
    10,000, uint16). The dates of S1 and S2 in a time step differ by some days. About half of
    the S2 observations are cloudy.

    The files are ``ROIs2017/32/S1/4/s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif`` and
    ``ROIs2017/32/S2/4/s2_ROIs2017_32_ImgNo_4_2018-02-24_patch_12.tif``. An S1 and an S2 file are a
    pair if season, ROI, patch and time step in their names are equal. Folders are ignored. Other
    files are left out, counted in :attr:`skipped` and reported in one warning: S1 without S2 and
    the reverse, several files with the same sensor, place and time step (none of them is used),
    other names, and files with problems, see :class:`geofm.datasets.catalogue.inspection.Problem`.

    Every root folder has one catalogue of its files, see :mod:`geofm.datasets.catalogue`. It is in
    the folder or, if this is read-only, in the user's cache. It is created when the folder is first
    opened, or by ``geofm index``. Files with a problem in the catalogue are left out. The catalogue
    of a small folder (see :data:`geofm.datasets.catalogue.catalogue.SMALL`) is updated each time
    the folder is opened. For a larger folder no file is opened, and a catalogue that is older than
    the data is used with a warning.

    Bands are identified by their descriptions in the files. A file without descriptions must have
    all bands of its sensor, in the order of the data set. Files that lack a requested band are left
    out; hence Level-2A files, which have no B10, are read only if *bands* does not include it.
    Scale and offset of a file are applied. Values are in dB for S1 and in DN for S2. Files that are
    clearly in another unit are listed as problems in the catalogue, and left out.

    Every patch is read on the grid of its S2 file, so that S2 is never resampled. S1 is warped
    (bilinear, in dB) only if it is on another grid. Interpolating decibels instead of power
    preserves the speckle statistics that the normalisation expects, and keeps bright scatterers
    from spreading.

    Splits are by ROI, from the official lists.

    If you use this dataset in your research, please cite the following paper:

    * https://doi.org/10.1109/TGRS.2022.3146246

    The pairs are stored in arrays that worker processes share, see
    :class:`geofm.datasets.pairs.PairTable`.

    Attributes:
        skipped: The files left out, by reason.
        bands: Names of the channels of 'image'.
        split: The split.
    """

    all_bands = BANDS
    filename_glob = '*.tif'
    _res = (PIXEL_SIZE, PIXEL_SIZE)
    #: First and last day of all pairs, if the file names have no dates.
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
        min_overlap: float = MIN_OVERLAP,
    ) -> None:
        """Initialize a new SEN12MSCRTS instance.

        Args:
            paths: Folders to search, or files; or a file ``.json`` with a list of pairs ``[[s1,
                s2], ...]``, as written by ``geofm index --pairs-json``, with paths that are
                absolute or relative to that file; or a catalogue ``.parquet`` written by ``geofm
                index --output``.
            split: One of 'train', 'val', 'test' or 'all'. ROIs that are not on the official lists
                are in 'train'.
            regions: World regions to keep: 'africa', 'america', 'asiaEast', 'asiaWest', 'europa'.
                Default: all regions, and ROIs that are not on the official list.
            bands: Names of the bands to return, in this order. Default: all bands of the sensors.
            transforms: Applied to each sample after everything else.
            sensors: 's1' and 's2', or one of them. With one sensor, each file is a sample, and the
                date of the other sensor is missing.
            pairing: 'time_step' pairs S1 and S2 of the same time step. 'nearest' pairs each S2 with
                the S1 of the same patch that is nearest in time.
            max_day_gap: Maximum number of days between S1 and S2.
            max_cloud_cover: Largest cloud-covered fraction of S2, 0 to 1. It is computed by ``geofm
                index --clouds``. S2 files without a known cloud cover are left out.
            dates: First and last day, e.g. ('2018-03-01', '2018-05-31'), within which the
                acquisitions must lie.
            on_error: What to do if a file cannot be read: 'raise' an error that names the file, or
                'skip' the pair. A skipped pair is replaced by another one of the same size, drawn
                from PyTorch's global generator, and counted in :attr:`failures`.
            catalogue: Catalogue of the folder *paths*, if it is neither in the folder nor in the
                user's cache.
            min_overlap: Smallest fraction of an S2 file, 0 to 1, that the S1 file of its pair must
                cover. Pairs below it are left out and counted in :attr:`skipped`. The fraction of
                each pair is the column 'overlap' of :attr:`index`. Pixels that S1 does not cover
                are not valid.

        Raises:
            BandError: If a band is unknown, given twice, or not a band of the sensors.
            DatasetNotFoundError: If no S1 or S2 file is found.
            EmptySplitError: If there are files, but no pair for *split* and *regions*. It is a
                ValueError.
            ValueError: If *split*, a region or another name is unknown, an argument is out of
                range, *max_cloud_cover* is given but no cloud cover is known, or a catalogue or
                list of pairs cannot be used.
        """
        if split not in get_args(Split):
            raise ValueError(f"unknown split '{split}': choose from {list(get_args(Split))}")
        unknown = [region for region in regions or () if region not in REGIONS]
        if unknown or isinstance(regions, str):
            raise ValueError(f'regions {regions!r} must be a list of names from {list(REGIONS)}')
        super().__init__(transforms, on_error)
        self.paths = paths if isinstance(paths, str | os.PathLike) else list(paths)
        self.split = split
        self.regions = None if regions is None else tuple(regions)
        self.sensors = _check_sensors(sensors)
        self.reference = self.sensors[-1]
        self.bands = _bands_of(self.sensors, bands)
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
            raise ValueError("max_cloud_cover needs S2, but sensors has only 's1'")
        self.min_overlap = check_overlap(min_overlap)
        self.pairing = pairing
        self.max_day_gap = max_day_gap
        self.max_cloud_cover = max_cloud_cover
        self.dates = None if dates is None else _check_dates(dates)
        self.catalogue = catalogue
        self.matches = self._scan()

    @property
    def unpaired(self) -> int:
        """Number of S1 files without S2 and S2 files without S1 that were left out."""
        return self.skipped.count(Reason.ONLY_S1, Reason.ONLY_S2)

    def _keeps(self, roi: Roi) -> bool:
        """Check whether a ROI is in the requested split and regions."""
        in_split = self.split == 'all' or self._split_of(roi) == self.split
        return in_split and (
            self.regions is None or any(roi in REGIONS[region] for region in self.regions)
        )

    def _split_of(self, roi: Roi) -> str:
        """Return the split of a ROI."""
        return split_of(*roi)

    def _scan(self) -> PairTable:
        """Find the pairs."""
        draft, rois = self._draft()
        pairs = draft.complete(self.skipped, self._period, self.min_overlap)
        self.skipped.warn()
        if said := pairs.partial_overlap():
            warn(said)
        if not rois:
            raise DatasetNotFoundError(self)
        if not len(pairs):
            there = ', '.join(f'{roi[0]}/{roi[1]} ({self._split_of(roi)})' for roi in rois)
            raise EmptySplitError(
                f"{self.paths}: no pair for split='{self.split}'{self._filters()}; existing ROIs: "
                f'{there}' + (f'; files left out: {self.skipped}' if self.skipped else '')
            )
        return pairs

    def _draft(self) -> tuple[Draft, list[Roi]]:
        """Return the pairs by file name, and all ROIs that exist."""
        listing = list_scenes(self.paths, self.catalogue)
        scenes = listing.scenes
        rows = listing.rows(dated=self._period is None)
        codes = scenes.season[rows].astype(np.int64) << 32 | scenes.roi[rows]
        there = np.unique(codes)
        rois = [(scenes.seasons[code >> 32], code & 0xFFFFFFFF) for code in there.tolist()]
        rows = rows[np.isin(codes, there[[self._keeps(roi) for roi in rois]])]
        listing.record_problems(rows, self.skipped)
        rows = self._with_bands(scenes, rows)
        return Draft.of(scenes, self._filter(scenes, self._pair(listing, rows))), rois

    def _with_bands(self, scenes: Scenes, rows: Rows) -> Rows:
        """Select the files that have the requested bands."""
        lacking = np.zeros(len(rows), bool)
        names = scenes.names[rows]
        for number, layout in enumerate(scenes.layouts):
            if layout:
                known = [*layout.split(), *_NOT_OF[sensor_of(layout.split()[0]).name]]
                lacking |= (names == number) & (not set(self.bands) <= set(known))
        lacking &= scenes.problem[rows] < 0
        if lacking.any():
            self.skipped.add(Reason.BANDS, *scenes.paths.take(rows[lacking]))
        return rows[~lacking]

    def _pair(self, listing: Listing, kept: Rows) -> dict[str, Rows]:
        """Return the files of each pair, by sensor."""
        if listing.pairs is None:
            return pair_scenes(listing.scenes, kept, self.sensors, self._pairing, self.skipped)
        if len(self.sensors) == 1:
            raise ValueError(f'{self.paths}: lists pairs, but sensors has only {self.sensors}')
        in_kept = np.isin(listing.pairs['s2'], kept)
        pairs = {sensor: files[in_kept] for sensor, files in listing.pairs.items()}
        return without_problems(listing.scenes, pairs)

    @property
    def _pairing(self) -> AnyPairing:
        """Method by which files are paired."""
        return self.pairing

    def _filter(self, scenes: Scenes, files: dict[str, Rows]) -> dict[str, Rows]:
        """Select the pairs with the requested dates and cloud cover."""
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
                    f"{self.paths}: cloud cover is not known; run 'geofm index --clouds'"
                )
            kept &= scenes.cloud_cover[files['s2']] <= self.max_cloud_cover
        return {sensor: rows[kept] for sensor, rows in files.items()}

    def _filters(self) -> str:
        """Describe the filters that are set, for an error."""
        given = {
            'regions': self.regions and list(self.regions),
            'max_day_gap': self.max_day_gap,
            'max_cloud_cover': self.max_cloud_cover,
            'dates': self.dates and [str(day) for day in self.dates],
        }
        return ''.join(f', {name}={value}' for name, value in given.items() if value is not None)


def _check_sensors(sensors: Sequence[str]) -> tuple[str, ...]:
    """Return the sensors in canonical order."""
    if isinstance(sensors, str) or not sensors or not set(sensors) <= set(SENSORS):
        raise ValueError(f'sensors {sensors!r} must be a list of names from {list(SENSORS)}')
    return tuple(sensor for sensor in SENSORS if sensor in sensors)


def _bands_of(sensors: Sequence[str], bands: Sequence[str] | None) -> tuple[str, ...]:
    """Return the bands to return, which must be bands of the sensors."""
    available = [band for sensor in sensors for band in SENSORS[sensor].band_names]
    bands = available if bands is None else check_bands(bands)
    others = [band for band in bands if band not in available]
    if others:
        raise BandError(f'bands {others} are not bands of the sensors {list(sensors)}: remove them')
    return tuple(bands)


def _check_dates(dates: Sequence[str]) -> tuple[np.datetime64, np.datetime64]:
    """Parse the first and last day."""
    try:
        first, last = (np.datetime64(day, 'D') for day in dates)
    except ValueError as err:
        raise ValueError(f'dates must be a first and a last day, not {dates}: {err}') from err
    if not first <= last:
        raise ValueError(f'dates must be a first and a last day, but {first} is after {last}')
    return first, last
