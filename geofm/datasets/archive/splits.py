"""Split the samples of an archive so that splits do not share ground."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from geofm.datasets.archive.archive_table import ArchiveTable
from geofm.datasets.footprints import SEARCH_CRS, extents, shapes_on_ground
from geofm.datasets.splitting import SPLITS, SplitRule, draw_groups
from geofm.lonlat import CIRCLE

#: Length of a meridian from pole to pole in kilometres, on a sphere with the Earth's mean radius.
_MERIDIAN_KM = math.pi * 6371.0088

#: Smallest side of a block: a metre. Memory is needed for each row of blocks.
_LEAST_KM = 0.001

#: Maximum number of blocks that a box may intersect.
_MOST_BLOCKS = 10_000

type Doubles = npt.NDArray[np.float64]


class Blocks:
    """Blocks that cover the globe without overlap.

    Bands of latitude with equal height are divided into columns so that the blocks are
    approximately square at that latitude. Hence all blocks have about the same area.

    Attributes:
        side_km: Side of a block in kilometres, rounded so that a whole number fits from pole to
            pole.
    """

    def __init__(self, side_km: float) -> None:
        """Initialize a new Blocks instance.

        Args:
            side_km: Side of a block in kilometres.

        Raises:
            ValueError: If *side_km* is not a positive number, or smaller than a metre.
        """
        if not side_km > 0 or not math.isfinite(side_km):
            raise ValueError(f'block_km must be a positive number of kilometres, not {side_km}')
        if side_km < _LEAST_KM:
            raise ValueError(f'block_km must be at least {_LEAST_KM:g} km, not {side_km:g} km')
        bands = max(round(_MERIDIAN_KM / side_km), 1)
        self.side_km = _MERIDIAN_KM / bands
        self._height = 180 / bands
        middle = np.radians(-90 + self._height * (np.arange(bands) + 0.5))
        self._columns = np.maximum(np.round(2 * bands * np.cos(middle)), 1).astype(np.int64)

    def touched(self, boxes: Doubles) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the blocks that boxes intersect.

        Args:
            boxes: West, south, east and north in degrees, shape (N, 4); east may exceed 180.

        Returns:
            Codes of blocks, and the index of the first code of each box. Each box has at least one.

        Raises:
            ValueError: If a box intersects thousands of blocks.
        """
        west, south, east, north = boxes.T
        bands = len(self._columns)
        low, high = (
            np.clip(np.floor((lat + 90) / self._height).astype(np.int64), 0, bands - 1)
            for lat in (south, north)
        )
        box, band = _ranges(low, high - low + 1)
        columns = self._columns[band]
        first, last = (
            np.floor((lon[box] + CIRCLE / 2) / CIRCLE * columns).astype(np.int64)
            for lon in (west, east)
        )
        per_band = np.minimum(last - first + 1, columns)
        if len(box) and np.bincount(box, per_band).max() > _MOST_BLOCKS:
            raise ValueError(
                f'blocks of {self.side_km:.3g} km are far smaller than the samples: set '
                'window_size, or larger blocks (block_km)'
            )
        pair, column = _ranges(first, per_band)
        codes = band[pair] << 32 | column % columns[pair]
        return codes, np.searchsorted(box[pair], np.arange(len(boxes)))


def widened(boxes: Doubles) -> Doubles:
    """Widen boxes around corners so that they also contain the curved edges.

    Args:
        boxes: West, south, east and north in degrees of the corners of grids, shape (N, 4).

    Returns:
        Wider boxes.
    """
    west, south, east, north = boxes.T
    highest = np.minimum(np.maximum(np.abs(south), np.abs(north)), 89.9)
    side = np.maximum((east - west) * np.cos(np.radians(highest)), north - south)
    # A straight line of length L deviates from a parallel by up to L^2 tan(latitude) / 8, in
    # radians.
    bow = np.radians(side) ** 2 * (1 + np.tan(np.radians(highest))) / 8
    margin = np.degrees(bow) + 1e-9
    wide = margin / np.cos(np.radians(highest))
    return np.stack((west - wide, south - margin, east + wide, north + margin), axis=1)


def _ranges(
    first: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return the owner and the members of consecutive integer ranges."""
    owner = np.repeat(np.arange(len(first)), count)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return owner, first[owner] + offset


#: Number of samples that are processed at once.
_AT_ONCE = 1 << 16

#: Smallest shared area, as a fraction of the smaller of two samples, that counts as overlap. The
#: effect of edges that are curved in another CRS is smaller than this.
_TOUCH = 1e-3

type Codes = npt.NDArray[np.int8]


def split_samples(samples: ArchiveTable, rule: SplitRule) -> Codes:
    """Find the split of each sample.

    Args:
        samples: The samples.
        rule: Rule by which they are split.

    Returns:
        Index into :data:`~geofm.datasets.splitting.SPLITS`, int8 (N,); -1 for a sample that extends
        into a block of another split, or has no split in the table.

    Raises:
        ValueError: If the table has no column 'split', a split has an unknown name, samples without
            a CRS are split by blocks, or nothing is left for training.
    """
    if rule.by == 'column':
        return _by_column(samples)
    if rule.by == 'blocks':
        return _by_blocks(samples, rule)
    group, keys = _place_groups(samples)
    weights = np.bincount(group, minlength=len(keys))
    return draw_groups(_mix(keys, rule.seed), weights, rule.val, rule.test)[group]


def _by_column(samples: ArchiveTable) -> Codes:
    """Return the splits of the table."""
    table = samples.archive.table
    if table.split is None:
        raise ValueError(
            f"{table.source}: has no column 'split': add one, or split by place or by blocks"
        )
    unknown = sorted(set(table.splits) - {*SPLITS, ''})
    if unknown:
        raise ValueError(f'{table.source}: unknown splits {unknown}: choose from {list(SPLITS)}')
    codes = [SPLITS.index(name) if name else -1 for name in table.splits]
    return np.array([*codes, -1], np.int8)[table.split[samples.main_rows()]]


def _by_blocks(samples: ArchiveTable, rule: SplitRule) -> Codes:
    """Split by blocks on the ground."""
    if (samples.epsg(slice(None)) <= 0).any():
        raise ValueError(
            f'{samples.archive.table.source}: rasters without a CRS cannot be split by blocks: '
            'split by place or by column'
        )
    blocks = Blocks(rule.block_km)
    codes: list[npt.NDArray[np.int64]] = []
    starts: list[npt.NDArray[np.int64]] = []
    total = 0
    for first in range(0, len(samples), _AT_ONCE):
        rows = slice(first, min(first + _AT_ONCE, len(samples)))
        boxes = widened(extents(samples.corners(rows, SEARCH_CRS), SEARCH_CRS))
        code, start = blocks.touched(boxes)
        codes.append(code)
        starts.append(start + total)
        total += len(code)
    every, begin = np.concatenate(codes), np.concatenate(starts)
    keys, number = np.unique(every, return_inverse=True)
    splits = draw_groups(_mix(keys, rule.seed), np.bincount(number), rule.val, rule.test)[number]
    lowest, highest = np.minimum.reduceat(splits, begin), np.maximum.reduceat(splits, begin)
    return np.where(lowest == highest, lowest, -1).astype(np.int8)


def _place_groups(
    samples: ArchiveTable,
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.uint64]]:
    """Group samples, and return a number per group that does not depend on the others."""
    scenes, scene = _distinct_scenes(samples)
    place = samples.archive.observations.place[scenes]
    links = [_same_place(place), _overlaps(samples, scenes)]
    one, other = np.concatenate(links, axis=1)
    size = (len(scenes), len(scenes))
    # Imported here, as worker processes do not need it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=size)
    _, group = connected_components(graph, directed=False)
    keys = np.full(group.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(keys, group, _scene_keys(samples, scenes))
    return group[scene], keys


def _distinct_scenes(samples: ArchiveTable) -> tuple[Any, Any]:
    """Return one observation per place and grid, and its index for each sample."""
    reference = samples.reference_observations()
    unique, number = np.unique(reference, return_inverse=True)
    table, main = samples.archive.table, samples.archive.main.array[unique]
    keys = pd.DataFrame(table.transform[main])
    keys['place'] = samples.archive.observations.place[unique]
    for name in ('epsg', 'height', 'width'):
        keys[name] = getattr(table, name)[main]
    if (keys['epsg'] <= 0).any():
        # An observation without a CRS and without a place is a group by itself.
        lone = (keys['epsg'] <= 0) & (keys['place'] < 0)
        keys['lone'] = np.where(lone, np.arange(len(keys)), -1)
    same = keys.groupby(list(keys.columns), sort=False, dropna=False).ngroup().to_numpy()
    _, first = np.unique(same, return_index=True)
    return unique[first], same[number]


def _same_place(place: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return pairs of scenes of the same place that form a chain per place."""
    order = np.argsort(place, kind='stable')
    same = (place[order][1:] == place[order][:-1]) & (place[order][1:] >= 0)
    return np.stack([order[:-1][same], order[1:][same]])


def _overlaps(samples: ArchiveTable, scenes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return pairs of scenes that share ground."""
    table, main = samples.archive.table, samples.archive.main.array[scenes]
    placed = np.flatnonzero(table.epsg[main] > 0)
    shapes = shapes_on_ground(samples.scene_corners(scenes[placed]), SEARCH_CRS)
    tree = shapely.STRtree(shapes)
    areas = shapely.area(shapes)
    found = [np.zeros((2, 0), np.int64)]
    for first in range(0, len(placed), _AT_ONCE):
        one, other = tree.query(shapes[first : first + _AT_ONCE], predicate='intersects')
        one = one + first
        later = other > one
        one, other = one[later], other[later]
        shared = shapely.area(shapely.intersection(shapes[one], shapes[other]))
        real = shared > _TOUCH * np.minimum(areas[one], areas[other])
        found.append(placed[np.stack([one[real], other[real]])])
    return np.concatenate(found, axis=1)


def _scene_keys(samples: ArchiveTable, scenes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return a number per scene from its place, or else its location, or else its file."""
    archive = samples.archive
    place = archive.observations.place[scenes]
    keys = np.zeros(len(scenes), np.uint64)
    named = place >= 0
    names = np.array(archive.table.places.take(place[named]), object)
    keys[named] = pd.util.hash_array(names)
    placed = ~named & (archive.table.epsg[archive.main.array[scenes]] > 0)
    middle = samples.scene_corners(scenes[placed]).mean(axis=1)
    # Round to about ten metres, so that rounding errors do not matter.
    x, y = np.round((middle + 360) * 1e4).astype(np.uint64).T
    keys[placed] = _mix(x * np.uint64(10**8) + y, 0)
    lone = ~named & ~placed
    rows = archive.main.array[scenes[lone]]
    keys[lone] = pd.util.hash_array(np.array(archive.table.paths.take(rows), object))
    return keys


def _mix(keys: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Hash numbers together with a seed by the finaliser of SplitMix64."""
    start = np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)[0]
    with np.errstate(over='ignore'):
        x = keys.astype(np.uint64) + start
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
