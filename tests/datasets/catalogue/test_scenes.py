from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.datasets.catalogue.columns import COLUMNS, empty_table, facts_to_arrow
from geofm.datasets.catalogue.scenes import NO_DAY, Scenes, Source, read_grids
from geofm.sen12ms import LARGEST_NUMBER

numbers = st.integers(0, 40) | st.integers(0, LARGEST_NUMBER)
keys = st.tuples(st.sampled_from(['ROIs2017', 'ROIs1158', 'ROIs1868']), numbers, numbers, numbers)


def source(rows: list[dict[str, Any]]) -> Source:
    blank: dict[str, Any] = {n: -1 for n, kind in COLUMNS.items() if kind is np.int32}
    blank |= {'size': 0, 'mtime': 0, 'gaps': False}
    columns = {
        name: pd.Series([row.get(name, blank.get(name)) for row in rows], dtype=kind)
        for name, kind in COLUMNS.items()
    }
    facts = facts_to_arrow(pd.DataFrame(columns))
    return Source('/data', lambda columns: iter(facts.select(columns).to_batches(3)))


@settings(deadline=None)
@given(st.lists(keys, min_size=1, max_size=12))
def test_keys_sort_like_their_columns(found: list[tuple[str, int, int, int]]) -> None:
    rows = [
        dict(zip(('season', 'roi', 'patch', 'time_step'), key, strict=True), path=f'{i}.tif')
        for i, key in enumerate(found)
    ]
    # In two parts, as from two catalogues.
    scenes = Scenes.read([source(rows[: len(rows) // 2]), source(rows[len(rows) // 2 :])])
    assert scenes.paths.take(np.arange(len(rows))) == [f'/data/{row["path"]}' for row in rows]
    assert [scenes.seasons[number] for number in scenes.season] == [key[0] for key in found]
    every = np.arange(len(rows))
    for ours, theirs in (
        (scenes.keys(every), found),
        (scenes.places(every), [k[:3] for k in found]),
    ):
        order = np.argsort(ours, kind='stable')
        assert order.tolist() == sorted(range(len(rows)), key=lambda i: theirs[i])
        for i, j in pairwise(order.tolist()):
            assert (ours[i] == ours[j]) == (theirs[i] == theirs[j])


def test_what_is_not_known() -> None:
    grid = dict(zip('abcdef', (1.0, 0.0, 5.0, 0.0, -1.0, 7.0), strict=True))
    known = {'path': 'a.tif', 'sensor': 's2', 'epsg': 32632, 'height': 3, 'width': 4, **grid}
    rows: list[dict[str, Any]] = [{'path': 'b.tif', 'problem': 'no bytes'}, known] * 3
    scenes = Scenes.read([source(rows)])
    assert scenes.sensor.tolist() == [-1, 1] * 3
    assert scenes.day.tolist() == [NO_DAY] * 6
    assert scenes.problem.tolist() == [0, -1] * 3
    assert scenes.problems == ('no bytes',)
    assert np.isnan(scenes.cloud_cover).all()
    parts = list(read_grids(scenes.sources))
    assert [part.first for part in parts] == [0, 3]
    transform = np.concatenate([part.transform for part in parts])
    assert np.isnan(transform[::2]).all()
    assert (transform[1::2] == list(grid.values())).all()
    assert np.concatenate([part.shape for part in parts])[1::2].tolist() == [[3, 4]] * 3


def test_no_rows() -> None:
    facts = facts_to_arrow(empty_table())
    scenes = Scenes.read([Source('', lambda columns: iter(facts.select(columns).to_batches()))])
    assert len(scenes) == len(scenes.paths) == 0
    assert isinstance(facts, pa.Table)
