"""Join pairs with another TorchGeo dataset, such as a raster of labels."""

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

#: Entries of a sample that describe its location. Those of the pair are kept.
_PLACED = ('bounds', 'transform', 'crs', 'index')


class PairIntersection(IntersectionDataset):
    """Intersection of pairs and another dataset, read on the grid of each pair.

    TorchGeo reads both datasets on a grid in the CRS of the first one. Here a pair is read on its
    own grid, and the other dataset is warped onto that grid, so that channels and labels are on the
    same pixels.
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
            pairs: The pairs, a :class:`~geofm.datasets.pairs.MatchedDataset`.
            other: The other dataset, a RasterDataset or VectorDataset.
            spatial_only: Whether to ignore dates.
            transforms: Applied to each sample after everything else.

        Raises:
            RuntimeError: If the datasets do not overlap in space and time.
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
        """Read a pair and the other dataset on its pixels.

        Args:
            index: [xmin:xmax, ymin:ymax, tmin:tmax] in the CRS of the index of the pairs.

        Returns:
            The sample of the pair, see
            :meth:`geofm.datasets.pairs.MatchedDataset.read_pair`, with the entries of the
            other dataset. If both have an 'image', these are concatenated along the channels.

        Raises:
            IndexError: If there is no such pair, or the other dataset has no data there.
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
        """Read the other dataset on the grid of a pair."""
        transform = Affine(*sample['transform'].tolist())
        if transform.b or transform.d:
            raise ValueError(
                f'pair {int(sample["index"])} is on a rotated grid, on which TorchGeo cannot '
                'read other datasets: warp its files to a north-up grid first'
            )
        # TorchGeo returns rows from north to south and columns from west to east. The grid of a
        # pair may have other directions.
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
        """Return the other dataset in a CRS."""
        if epsg not in self._in_crs:
            other = copy.copy(self.datasets[1])
            # Cached files are warped to one grid and cannot be reused.
            other.cache = False  # type: ignore[attr-defined]
            other.index = other.index.to_crs(pyproj.CRS(epsg))
            self._in_crs[epsg] = other
        return self._in_crs[epsg]


def _warp_to(other: RasterDataset, transform: Affine, height: int, width: int) -> None:
    """Make a dataset read its files on a given grid.

    TorchGeo warps a file to a grid chosen by GDAL, and resamples the result to the requested grid,
    which shifts labels by up to one of their pixels.
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
