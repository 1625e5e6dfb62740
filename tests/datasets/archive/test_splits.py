"""Splits of archives, which must not share ground."""

from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geofm.datasets.archive.archive_table import Archive, ArchiveTable
from geofm.datasets.archive.building import Selection, build_samples
from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.archive.splits import Blocks, split_samples, widened
from geofm.datasets.footprints import corners
from geofm.datasets.splitting import SPLITS, SplitRule, draw_groups
from tests.datasets.archive.tables import boxes_table

#: Tolerance of a metre, for rounding and edges that are straight in one CRS only, as a fraction of
#: a sample.
SLIVER = 2e-3


def samples_of(tmp_path: Path, boxes: list[dict[str, Any]], size: int | None) -> ArchiveTable:
    table = boxes_table(tmp_path / 'table.csv', boxes)
    selection = Selection(('s2',), 's2', ('B02',), (), size, 'shift', None, 0.5)
    return build_samples(Archive.of(table), selection, LeftOut())


def on_ground(samples: ArchiveTable) -> Any:
    """Return densified outlines in an equal-area projection, as a reference without longitudes."""
    plane = pyproj.CRS('+proj=laea +lat_0=45 +lon_0=3')
    shapes = []
    for i in range(len(samples)):
        grid = samples.grid(i)
        outline = shapely.segmentize(grid.footprint(), max(grid.res) * 8)
        to_plane = pyproj.Transformer.from_crs(grid.crs.to_epsg(), plane, always_xy=True)
        points = shapely.get_coordinates(outline)
        x, y = to_plane.transform(points[:, 0], points[:, 1])
        shapes.append(shapely.Polygon(np.stack((x, y), axis=1)))
    return np.array(shapes)


def worst_overlap(samples: ArchiveTable, codes: Any) -> float:
    """Return the largest fraction of a sample that is in a sample of another split."""
    shapes = on_ground(samples)
    worst = 0.0
    tree = shapely.STRtree(shapes)
    for i, j in tree.query(shapes, predicate='intersects').T:
        if codes[i] >= 0 and codes[j] >= 0 and codes[i] != codes[j]:
            shared = shapely.area(shapely.intersection(shapes[i], shapes[j]))
            worst = max(worst, shared / min(shapely.area(shapes[[i, j]])))
    return worst


BOX = st.fixed_dictionaries(
    {
        'x': st.integers(0, 3000).map(lambda v: 500_000 + 10 * v),
        'y': st.integers(0, 3000).map(lambda v: 5_000_000 + 10 * v),
        'height': st.integers(20, 700),
        'width': st.integers(20, 700),
        'res': st.sampled_from([10, 10, 20]),
        'sensor': st.just('s2'),
        'place': st.sampled_from(['', '', 'a', 'b', 'c']),
        'epsg': st.sampled_from([32631, 32631, 32632]),
    }
)


def distinct(boxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples with different times, and samples of another zone on the same ground."""
    zone = pyproj.Transformer.from_crs(32631, 32632, always_xy=True)
    result = []
    for i, box in enumerate(boxes):
        box = {**box, 'datetime': f'2018-01-{i + 1:02d}'}
        if box['epsg'] == 32632:
            box['x'], box['y'] = (round(v, -1) for v in zone.transform(box['x'], box['y']))
        result.append(box)
    return result


@pytest.mark.parametrize('rule', [SplitRule('blocks', block_km=5), SplitRule('place')])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(boxes=st.lists(BOX, min_size=3, max_size=12), size=st.sampled_from([64, 100, None]))
def test_samples_of_different_splits_share_no_ground(
    tmp_path: Path, rule: SplitRule, boxes: list[dict[str, Any]], size: int | None
) -> None:
    samples = samples_of(tmp_path, distinct(boxes), size)
    try:
        codes = split_samples(samples, rule)
    except ValueError:
        # All places are connected.
        return
    assert worst_overlap(samples, codes) < SLIVER
    if rule.by == 'place':
        assert (codes >= 0).all()


def test_blocks_keep_most_of_a_large_scene(tmp_path: Path) -> None:
    scene = {'x': 500_000, 'y': 5_000_000, 'height': 5490, 'width': 5490, 'res': 20}
    boxes = [{**scene, 'sensor': 's2', 'datetime': '2018-01-01'}]
    samples = samples_of(tmp_path, boxes, 64)
    codes = split_samples(samples, SplitRule('blocks', 0.2, 0.2, block_km=20))
    shares = [(codes == i).mean() for i in range(len(SPLITS))]
    assert sum(shares) > 0.8
    assert shares[1] == pytest.approx(0.2, abs=0.08)
    assert shares[2] == pytest.approx(0.2, abs=0.08)


def test_a_growing_archive_keeps_its_splits(tmp_path: Path) -> None:
    boxes = [
        {
            'x': 300_000 + 3000 * (i % 20),
            'y': 5_000_000 + 3000 * (i // 20),
            'height': 256,
            'width': 256,
            'res': 10,
            'sensor': 's2',
            'place': f'p{i}',
        }
        for i in range(400)
    ]
    for rule in (SplitRule('place', 0.2, 0.2), SplitRule('blocks', 0.2, 0.2, block_km=10)):
        half = split_samples(samples_of(tmp_path, boxes[:200], None), rule)
        whole = split_samples(samples_of(tmp_path, boxes, None), rule)
        assert (half == whole[:200]).mean() > 0.8
        other = split_samples(samples_of(tmp_path, boxes, None), SplitRule(rule.by, 0.2, 0.2, 1))
        assert (whole != other).mean() > 0.2


def test_places_stay_whole_whatever_their_order(tmp_path: Path) -> None:
    boxes = [
        {
            'x': 300_000 + 9000 * (i % 7),
            'y': 5_000_000,
            'height': 99,
            'width': 99,
            'res': 10,
            'sensor': 's2',
            'place': f'p{i % 7}',
            'datetime': f'2018-02-{i + 1:02d}',
        }
        for i in range(21)
    ]
    rule = SplitRule('place', 0.3, 0.3)
    samples = samples_of(tmp_path, boxes, 50)
    names = samples.frame(pyproj.CRS(4326))['place'].to_numpy()
    codes = split_samples(samples, rule)
    by_name = {name: set(codes[names == name].tolist()) for name in set(names)}
    assert all(len(found) == 1 for found in by_name.values())
    turned = samples_of(tmp_path, boxes[::-1], 50)
    again = split_samples(turned, rule)
    names = turned.frame(pyproj.CRS(4326))['place'].to_numpy()
    assert by_name == {name: set(again[names == name].tolist()) for name in set(names)}


def test_one_group_is_too_few_for_two_splits() -> None:
    with pytest.raises(ValueError, match=r'\{by: blocks, block_km: 1, val: 0\.2, test: 0\.0\}'):
        draw_groups(np.zeros(1), np.ones(1), 0.2, 0.0)


def test_column(tmp_path: Path) -> None:
    box = {'x': 0, 'y': 0, 'height': 9, 'width': 9, 'res': 10, 'sensor': 's2'}
    names = ['train', 'val', 'test', 'train']
    boxes = [{**box, 'place': f'p{i}', 'split': name} for i, name in enumerate(names)]
    codes = split_samples(samples_of(tmp_path, boxes, None), SplitRule('column'))
    assert codes.tolist() == [0, 1, 2, 0]
    boxes[1]['split'] = 'dev'
    with pytest.raises(ValueError, match=r"unknown splits \['dev'\]"):
        split_samples(samples_of(tmp_path, boxes, None), SplitRule('column'))
    lone = [{**box, 'place': 'p'}]
    with pytest.raises(ValueError, match="no column 'split'"):
        split_samples(samples_of(tmp_path, lone, None), SplitRule('column'))


@settings(deadline=None)
@given(
    st.floats(-180, 179),
    st.floats(-89.9, 89.8),
    st.floats(0, 3),
    st.floats(0, 2),
    st.sampled_from([5.0, 50.0, 700.0, 1e5]),
)
def test_blocks_touched_are_those_of_every_point(
    west: float, south: float, width: float, height: float, side: float
) -> None:
    blocks = Blocks(side)
    north = min(south + height, 90.0)
    box = np.array([[west, south, west + width, north]])
    try:
        codes, starts = blocks.touched(box)
    except ValueError:
        # More blocks than a sample may intersect.
        assert side == 5
        return
    assert starts.tolist() == [0]
    rng = np.random.default_rng(0)
    points = rng.uniform((west, south), (west + width, north), (50, 2))
    points[:, 0] = (points[:, 0] + 180) % 360 - 180
    single, begin = blocks.touched(np.concatenate([points, points], axis=1))
    assert begin.tolist() == list(range(50))
    assert set(single.tolist()) <= set(codes.tolist())


def test_blocks_have_about_the_same_area() -> None:
    blocks = Blocks(100)
    rng = np.random.default_rng(0)
    # Uniform on the sphere.
    lat = np.degrees(np.arcsin(rng.uniform(-0.99, 0.99, 200_000)))
    lon = rng.uniform(-180, 180, len(lat))
    codes, _ = blocks.touched(np.stack((lon, lat, lon, lat), axis=1))
    _, counts = np.unique(codes, return_counts=True)
    expected = len(lat) * 100**2 / (0.99 * 4 * np.pi * 6371.0088**2)
    assert counts.mean() == pytest.approx(expected, rel=0.05)


def test_widened_boxes_contain_curved_edges() -> None:
    for epsg, x, y in ((32631, 300_000, 8_800_000), (32631, 700_000, 100_000), (3413, 1e5, -9e5)):
        side, res = 1098, 100
        transform = np.array([[res, 0, x, 0, -res, y]], float)
        points = corners(np.array([epsg], np.int32), transform, np.array([[side, side]], np.int32))
        box = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
        wide = widened(box)[0]
        steps = np.linspace(0, side * res, 500)
        still = np.zeros_like(steps)
        east = np.concatenate([steps, steps, still, still + side * res])
        south = np.concatenate([still, still + side * res, steps, steps])
        to_degrees = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
        lon, lat = to_degrees.transform(x + east, y - south)
        assert wide[0] <= min(lon)
        assert max(lon) <= wide[2]
        assert wide[1] <= min(lat)
        assert max(lat) <= wide[3]


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=3, max_size=60), st.floats(0, 0.4), st.floats(0, 0.4))
def test_shares_of_groups(sizes: list[int], val: float, test: float) -> None:
    weights = np.array(sizes)
    codes = draw_groups(np.random.default_rng(0).permutation(len(sizes)), weights, val, test)
    assert (codes == 0).any()
    for code, share in ((1, val), (2, test)):
        got = weights[codes == code].sum() / weights.sum()
        assert (codes == code).any() == (share > 0) or got > 0
        assert abs(got - share) <= 2 * max(sizes) / weights.sum() + 1e-9


def test_wrong_rules_are_refused() -> None:
    for kwargs, said in (
        ({'by': 'date'}, 'unknown'),
        ({'val': 1.5}, 'from 0 to 1'),
        ({'test': -0.1}, 'from 0 to 1'),
    ):
        with pytest.raises(ValueError, match=said):
            SplitRule(**kwargs)
    with pytest.raises(ValueError, match='positive'):
        Blocks(0)
