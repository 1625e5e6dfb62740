"""Pairs on both sides of the antimeridian: index, catalogue and queries."""

import json
from datetime import date
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from torchgeo.samplers import RandomPatchSampler

from geofm.datasets import SEN12MSCRTS
from geofm.datasets.catalogue.catalogue import CATALOGUE_NAME
from geofm.sen12ms import PairKey
from tests.datasets.tree import SIZE, grid_at, write_pair

#: Upper left corner of each pair: on the antimeridian, just west, just east, and on the other side.
PLACES = {
    'across': (32760, 820_130.0),
    'west': (32760, 819_000.0),
    'east': (32701, 181_000.0),
    'africa': (4326, 12.0),
}
LATITUDE = -16.5


@pytest.fixture(scope='module')
def dataset(module_path: Path) -> SEN12MSCRTS:
    for number, (epsg, x) in enumerate(PLACES.values()):
        y = LATITUDE if epsg == 4326 else 8_173_373.0
        # Each pair is in another ROI of the training split.
        key = PairKey('ROIs1868', (36, 56, 85, 114)[number], 0, 0)
        write_pair(module_path, key, grid_at(epsg, x, y), date(2018, 2, 28), date(2018, 2, 24))
    return SEN12MSCRTS(module_path, split='all')


def roi(dataset: SEN12MSCRTS, number: int) -> str:
    return dict(zip((36, 56, 85, 114), PLACES, strict=True))[int(dataset.index.iloc[number].roi)]


def test_outlines_do_not_span_the_globe(dataset: SEN12MSCRTS) -> None:
    bounds = dataset.index.bounds
    assert (bounds.maxx - bounds.minx).max() < 0.01
    assert (bounds.maxx > 180).sum() == 1


def test_each_row_gives_its_own_pair(dataset: SEN12MSCRTS) -> None:
    for number, row in enumerate(dataset.index.itertuples()):
        left, bottom, right, top = row.geometry.bounds
        sample = dataset[left:right, bottom:top, row.Index.left : row.Index.right]
        assert sample['index'] == number
        assert sample['image'].shape[-2:] == (SIZE, SIZE)
        if right <= 180:
            continue
        for shift in (360, -360):
            again = dataset[left + shift : right + shift, bottom:top]
            assert again['index'] == number
        # West is greater than east, as in RFC 7946.
        again = dataset[left : right - 360, bottom:top]
        assert again['index'] == number
        assert again['image'].shape[-2:] == (SIZE, SIZE)


@pytest.mark.parametrize(
    ('west', 'east', 'expected'),
    [
        (179.985, 179.995, 'west'),
        (-179.995, -179.98, 'east'),
        (180.005, 180.02, 'east'),
        (-180.015, -180.005, 'west'),
        (179.9985, -179.9985, 'across'),
        (11.9, 12.1, 'africa'),
    ],
)
def test_a_query_finds_the_pairs_at_its_location(
    dataset: SEN12MSCRTS, west: float, east: float, expected: str
) -> None:
    assert roi(dataset, int(dataset[west:east, -17.0:-16.0]['index'])) == expected


def test_a_query_without_pairs_finds_nothing(dataset: SEN12MSCRTS) -> None:
    for west, east in ((100.0, 170.0), (-170.0, 5.0), (170.0, 175.0), (-175.0, -170.0)):
        with pytest.raises(IndexError, match='not found'):
            dataset[west:east, -17.0:-16.0]


def test_samplers_of_torchgeo_draw_where_there_are_pairs(dataset: SEN12MSCRTS) -> None:
    drawn = set()
    # The sampler draws points in a box until enough are in a pair: few are in a box of the globe.
    for west in (179, -181, 11):
        roi = shapely.box(west, -17, west + 2, -16)
        sampler = RandomPatchSampler(dataset, size=8, length=20, roi=roi, generator=0)
        drawn |= {int(dataset[query]['index']) for query in sampler}
    assert drawn == set(range(len(PLACES)))


def test_the_index_may_be_set_and_is_searched_alike(dataset: SEN12MSCRTS) -> None:
    part = SEN12MSCRTS(dataset.paths, split='all')
    part.index = part.index[part.index.bounds.minx.abs() > 179]
    assert len(part) == 3
    sample = part[179.9985:-179.9985, -17.0:-16.0]
    assert int(part.index.iloc[int(sample['index'])].roi) == 36


def test_the_catalogue_cuts_outlines_and_gives_a_box_that_crosses(dataset: SEN12MSCRTS) -> None:
    (path,) = Path(str(dataset.paths)).rglob(CATALOGUE_NAME)
    table = gpd.read_parquet(path)
    parts = table.geometry.explode().bounds
    assert (parts.maxx - parts.minx).max() < 0.01
    assert parts.minx.min() >= -180
    assert parts.maxx.max() <= 180
    geo = json.loads(pq.read_schema(path).metadata[b'geo'])['columns']['geometry']
    assert set(geo['geometry_types']) == {'MultiPolygon', 'Polygon'}
    west, _, east, _ = geo['bbox']
    # From Africa eastward over the antimeridian.
    assert west == pytest.approx(12, abs=0.01)
    assert east == pytest.approx(-179.98, abs=0.02)
    assert isinstance(table, pd.DataFrame)
    assert np.isfinite(parts.to_numpy()).all()
