"""Pairs and another TorchGeo data set, such as a raster of labels, on the grid of each pair."""

import copy
from collections.abc import Callable

import pyproj
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from torchgeo.datasets import GeoDataset, IntersectionDataset, RasterDataset, VectorDataset
from torchgeo.datasets.utils import GeoSlice, Path, Sample, concat_samples

#: Entries of a sample that say where it lies: those of the pair stay.
_PLACED = ('bounds', 'transform', 'crs', 'index')


class PairIntersection(IntersectionDataset):
    """Pairs and another data set, of the same ground.

    TorchGeo reads both data sets on a grid in the CRS of the first one. A pair is read on its own
    grid instead, whatever the CRS of the index, so the other data set is warped onto that
    grid: channels and labels lie on the same pixels.
    """

    def __init__(
        self,
        pairs: GeoDataset,
        other: GeoDataset,
        spatial_only: bool = False,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Initialize a new PairIntersection instance.

        Args:
            pairs: The pairs, a :class:`~geofm.datasets.pairs.dataset.PairDataset`.
            other: What to read with them, a RasterDataset or VectorDataset.
            spatial_only: Whether to ignore dates.
            transforms: Applied to each sample, last.

        Raises:
            RuntimeError: If the data sets have no ground or no time in common.
            TypeError: If *other* is neither a RasterDataset nor a VectorDataset.
        """
        if not isinstance(other, RasterDataset | VectorDataset):
            raise TypeError(
                f'pairs can be joined with a RasterDataset or VectorDataset, not with '
                f'{type(other).__name__}'
            )
        super().__init__(pairs, other, spatial_only, transforms=transforms)
        self._spatial_only = spatial_only
        self._in_crs: dict[int, GeoDataset] = {}

    def __getitem__(self, index: GeoSlice) -> Sample:
        """Read a pair and what the other data set has on its pixels.

        Args:
            index: [xmin:xmax, ymin:ymax, tmin:tmax] in the CRS of the pairs' index.

        Returns:
            The sample of the pair, see
            :meth:`geofm.datasets.pairs.dataset.PairDataset.read_pair`, with the entries of the
            other data set. 'image' of both is concatenated along the channels.

        Raises:
            IndexError: If there is no such pair, or the other data set has nothing there.
            ValueError: If the grid of the pair is rotated.
        """
        sample = self.datasets[0][index]
        t = index[2] if isinstance(index, tuple) and len(index) == 3 else slice(None)
        other = self._read_other(sample, slice(None) if self._spatial_only else t)
        joined = concat_samples(
            [
                {key: value for key, value in part.items() if key not in _PLACED}
                for part in (sample, other)
            ]
        )
        joined |= {key: sample[key] for key in _PLACED}
        return joined if self.transforms is None else self.transforms(joined)

    def _read_other(self, sample: Sample, t: slice) -> Sample:
        """Sample of the other data set on the grid of a pair."""
        transform = Affine(*sample['transform'].tolist())
        if transform.b or transform.d:
            raise ValueError(
                f'pair {int(sample["index"])} lies on a rotated grid, on which TorchGeo cannot '
                'read other data sets: warp its files to an upright grid first'
            )
        # TorchGeo's rows run south and its columns east; the grid of a pair may run otherwise.
        axes = [axis for axis, flip in ((-2, transform.e > 0), (-1, transform.a < 0)) if flip]
        left, bottom, right, top = sample['bounds'].tolist()
        res = abs(transform.a), abs(transform.e)
        height, width = sample['valid'].shape[-2:]
        other = self._other_in(int(sample['crs']))
        if isinstance(other, RasterDataset):
            upright = Affine(res[0], 0, left, 0, -res[1], top)
            _warp_to(other, upright, height, width)
        read = other[left : right : res[0], bottom : top : res[1], t]
        return {
            key: torch.flip(value, axes) if key in ('image', 'mask') and axes else value
            for key, value in read.items()
        }

    def _other_in(self, epsg: int) -> GeoDataset:
        """The other data set, read in a CRS."""
        if epsg not in self._in_crs:
            other = copy.copy(self.datasets[1])
            # Open files are those of one grid.
            other.cache = False  # type: ignore[attr-defined]
            other.index = other.index.to_crs(pyproj.CRS(epsg))
            self._in_crs[epsg] = other
        return self._in_crs[epsg]


def _warp_to(other: RasterDataset, transform: Affine, height: int, width: int) -> None:
    """Have a data set read its files on one grid.

    TorchGeo warps a file to a grid that GDAL chooses and resamples that to the grid asked for,
    which puts labels up to a pixel of theirs off.
    """

    def load(filepath: Path, crs: pyproj.CRS | None = None) -> WarpedVRT:
        given = {} if other.nodata is None else {'src_nodata': other.nodata}
        with rasterio.open(filepath) as src:
            return WarpedVRT(
                src,
                crs=CRS.from_user_input(crs),
                transform=transform,
                height=height,
                width=width,
                resampling=other.resampling,
                **given,
            )

    other._load_warp_file = load  # type: ignore[method-assign]
