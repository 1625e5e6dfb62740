"""Labelled windows of the generated sample data."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as FilePath
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio.windows import Window
from torchgeo.datasets import NonGeoDataset
from torchgeo.datasets.utils import Path, Sample

from geofm.datasets.sen12mscrts import SEN12MSCRTS
from geofm.datasets.splitting import Split
from geofm.grid import Grid
from geofm.rasters import open_raster
from geofm.sample import LAND_COVER, SCENES, land_cover_path
from geofm.sensors import BANDS

#: Which time steps to use: all, or those without clouds in Sentinel-2.
Dates = Literal['all', 'clear']

#: Largest cloud-covered fraction of a patch on a clear date.
CLEAR = 0.02

_LOG = logging.getLogger(__name__)


class _Item(NamedTuple):
    """A window of a pair, and its label."""

    pair: int
    row: int
    col: int
    label: int


class SampleLandCover(NonGeoDataset):
    """Land cover of windows of the sample data that ``geofm sample-data`` generates.

    Every patch is cut into windows that do not overlap, at each of its time steps. The label of a
    window is the class that covers most of it; its mask holds the class of each pixel. The data are
    synthetic: they are for trying things out, and results on them have no scientific meaning.

    Attributes:
        classes: Names of the classes.
        index: One row per window, with the columns pair (row of ``pairs.index``), row, col, label.
        left_out: Number of windows left out because no class covers at least *min_purity* of them.
        pairs: The pairs of scenes that the windows are read from.
    """

    classes: tuple[str, ...] = tuple(land_cover.name for land_cover in LAND_COVER)

    def __init__(
        self,
        paths: Path | Iterable[Path],
        split: Split = 'train',
        window: int = 64,
        min_purity: float = 0.6,
        bands: Sequence[str] = BANDS,
        transforms: Callable[[Sample], Sample] | None = None,
        dates: Dates = 'all',
    ) -> None:
        """Initialize a new SampleLandCover instance.

        Args:
            paths: Folders written by ``geofm sample-data``.
            split: One of 'train', 'val', 'test' or 'all'.
            window: Height and width of a window in pixels. A remainder at the right and bottom of a
                patch is not used.
            min_purity: Smallest fraction of a window, 0 to 1, that its class must cover. Windows
                below it are left out and counted in :attr:`left_out`. 0 keeps all windows, e.g. for
                segmentation.
            bands: Names of the bands to return, in this order.
            transforms: Applied to each sample after everything else.
            dates: Use 'all' time steps, or only the 'clear' ones.

        Raises:
            BandError: If a band is unknown or given twice.
            DatasetNotFoundError: If no S1 or S2 file is found.
            ValueError: If an argument is out of range, a land-cover map or the table of scenes is
                missing or does not match the data, or no window is left.
        """
        if dates not in get_args(Dates):
            raise ValueError(f"unknown dates '{dates}': choose from {list(get_args(Dates))}")
        if window < 1 or not 0 <= min_purity <= 1:
            raise ValueError(
                f'window must be 1 or more and min_purity 0 to 1, got {window} and {min_purity}'
            )
        self.pairs = SEN12MSCRTS(paths, split, bands=bands)
        self.paths = self.pairs.paths
        self.split = split
        self.window = window
        self.min_purity = min_purity
        self.bands = self.pairs.bands
        self.transforms = transforms
        self.dates = dates
        self.left_out = 0
        self.index = pd.DataFrame(self._items(), columns=list(_Item._fields))
        if self.index.empty:
            raise ValueError(
                f"{self.paths}: no window of {window} pixels in split '{split}', dates '{dates}' "
                f'is at least {min_purity:.0%} one class; lower min_purity'
            )
        _LOG.info(
            '%s: %d windows; %d left out, as less than %.0f %% of each is one class',
            self.paths,
            len(self),
            self.left_out,
            100 * min_purity,
        )

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        """Read a window.

        Args:
            index: Index of the window.

        Returns:
            The sample of :meth:`SEN12MSCRTS.read_pair` for the window, with

            * mask: int64 (H, W), class of each pixel as an index into :attr:`classes`
            * label: int64 (), the class that covers most of it
            * index: int64 (), index of the window

        Raises:
            IndexError: If there is no such window.
            ValueError: If a file cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'window {index} of {len(self)}: out of range')
        pair, row, col, label = (int(v) for v in self.index.iloc[index])
        window = Window(col, row, self.window, self.window)
        sample = self.pairs.read_pair(pair, window)
        mask = _read_land_cover(self._land_cover_of(pair), window)
        sample['mask'] = torch.from_numpy(mask.astype(np.int64))
        sample['label'] = torch.tensor(label)
        sample['index'] = torch.tensor(int(index) % len(self))
        return sample if self.transforms is None else self.transforms(sample)

    def files_of(self, index: int) -> list[FilePath]:
        """Return the files that a sample is read from.

        Args:
            index: Index of the window, 'index' of the sample.

        Returns:
            The files of both sensors and the land-cover map.
        """
        pair = int(self.index['pair'].iloc[index])
        return [*self.pairs.files_of(pair), self._land_cover_of(pair)]

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Draw a sample, with a legend of its classes.

        Args:
            sample: A sample of this dataset, in raw units.
            show_titles: Whether to show a title above each panel.
            suptitle: Title of the figure. Default: the label, and the prediction if there is one.

        Returns:
            The figure.

        Raises:
            RGBBandsMissingError: If the dataset has neither B04, B03 and B02 nor VV and VH.
        """
        if suptitle is None:
            named = [
                f'{key}: {self.classes[int(sample[key])]}'
                for key in ('label', 'prediction')
                if key in sample and sample[key].numel() == 1
            ]
            suptitle = ', '.join(named) or None
        # Labels and their predictions are in the title; the panels show images and maps only.
        maps = {
            key: value
            for key, value in sample.items()
            if key != 'label' and (key != 'prediction' or value.ndim >= 2)
        }
        fig = self.pairs.plot(maps, show_titles=show_titles, suptitle=suptitle)
        self._name_classes(fig)
        return fig

    def _name_classes(self, fig: Figure) -> None:
        """Give each class of the maps in a figure its colour, and add a legend."""
        colors = np.array([land_cover.color for land_cover in LAND_COVER]) / 255
        shown: set[int] = set()
        for image in (image for ax in fig.axes for image in ax.images):
            values = np.asarray(image.get_array())
            if values.ndim == 2:
                image.set(cmap=ListedColormap(colors), clim=(-0.5, len(colors) - 0.5))
                shown |= set(np.unique(values).tolist())
        if shown:
            patches = [
                Patch(color=color, label=name)
                for i, (name, color) in enumerate(zip(self.classes, colors, strict=True))
                if i in shown
            ]
            fig.legend(handles=patches, loc='outside lower center', ncols=len(patches))

    def _items(self) -> list[_Item]:
        """Return the labelled windows of all pairs; count those left out."""
        items = []
        kept = np.ones(len(self.pairs), bool) if self.dates == 'all' else self._clear()
        windows: dict[FilePath, list[tuple[int, int, int]]] = {}
        for pair in np.flatnonzero(kept).tolist():
            path = self._land_cover_of(pair)
            if path not in windows:
                windows[path] = self._windows(path, pair)
            pure = [w for w in windows[path] if w[2] >= 0]
            self.left_out += len(windows[path]) - len(pure)
            items += [_Item(pair, *w) for w in pure]
        return items

    def _windows(self, path: FilePath, pair: int) -> list[tuple[int, int, int]]:
        """Return row, column and label of the windows of a patch; the label is -1 where mixed."""
        land_cover = _read_land_cover(path)
        row = self.pairs.index.iloc[pair]
        with open_raster(path) as src, open_raster(row.s2) as s2:
            if Grid.of(src).shape != Grid.of(s2).shape or not Grid.of(src).window_in(Grid.of(s2)):
                raise ValueError(f'{path}: not on the pixel grid of {row.s2}')
        labels, purity = window_labels(land_cover, self.window)
        labels[purity < self.min_purity] = -1
        places = np.argwhere(labels >= -1)
        return [(int(y) * self.window, int(x) * self.window, int(labels[y, x])) for y, x in places]

    def _land_cover_of(self, pair: int) -> FilePath:
        """Return the path of the land-cover map of a pair."""
        row = self.pairs.index.iloc[pair]
        return land_cover_path(FilePath(row.s2).parents[4], (row.season, row.roi), row.patch)

    def _clear(self) -> npt.NDArray[np.bool_]:
        """Return for each pair whether its Sentinel-2 image is free of clouds."""
        place = ['season', 'roi', 'patch', 'time_step']
        clear: set[tuple[object, ...]] = set()
        for root in {FilePath(s2).parents[4] for s2 in self.pairs.index.s2}:
            if not (root / SCENES).is_file():
                raise ValueError(
                    f"{root / SCENES}: not found, so clear dates are not known; 'geofm "
                    "sample-data' writes this file with the data"
                )
            scenes = pd.read_csv(root / SCENES)
            rows = scenes.loc[scenes.cloud_cover <= CLEAR, place]
            clear |= {(root, *row) for row in rows.itertuples(index=False)}
        keys = (
            (FilePath(row.s2).parents[4], row.season, row.roi, row.patch, row.time_step)
            for row in self.pairs.index.itertuples(index=False)
        )
        return np.array([key in clear for key in keys])


def window_labels(
    land_cover: npt.NDArray[np.uint8], window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the class that covers most of each window of a map; of several, the first.

    Args:
        land_cover: Class values, shape (H, W).
        window: Height and width of the windows.

    Returns:
        Class of each window, and the fraction of the window that it covers, both of shape
        (H // window, W // window).
    """
    rows, cols = (n // window for n in land_cover.shape)
    blocks = land_cover[: rows * window, : cols * window].reshape(rows, window, cols, window)
    shares = np.stack([(blocks == i).mean(axis=(1, 3)) for i in range(len(LAND_COVER))])
    return shares.argmax(axis=0), shares.max(axis=0)


def _read_land_cover(path: FilePath, window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Read the class values of a map, or of a window of it."""
    if not path.is_file():
        raise ValueError(
            f"{path}: land-cover map not found; 'geofm sample-data' writes it with the data"
        )
    with open_raster(path) as src:
        land_cover = src.read(1, window=window)
    if land_cover.max() >= len(LAND_COVER):
        raise ValueError(
            f'{path}: value {land_cover.max()} is not one of the {len(LAND_COVER)} classes; the '
            "map was not written by 'geofm sample-data'"
        )
    return land_cover
