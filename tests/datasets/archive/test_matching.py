"""Matching and windows, compared with brute force."""

from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.datasets.archive.matching import DAY, Frames, Rule, match_windows
from geofm.datasets.archive.windowing import Windows, window_grid
from geofm.datasets.table import NO_TIME, RasterTable


class Grids(NamedTuple):
    """The columns of a table that matching reads."""

    epsg: Any
    transform: Any
    height: Any
    width: Any


def frames(rows: list[tuple[int, int | None, int, int, int]]) -> Frames:
    """Make observations from (place, day, x, y, size) with pixels of 1 m."""
    place, days, x, y, size = (list(column) for column in zip(*rows, strict=True))
    transform = [(1, 0, left, 0, -1, top) for left, top in zip(x, y, strict=True)]
    return Frames(
        np.array(place),
        np.array([NO_TIME if day is None else day * DAY + DAY // 3 for day in days], np.int64),
        # Rows of a table may be in any order.
        np.arange(len(place))[::-1],
        cast(
            RasterTable,
            Grids(
                np.full(len(place), 32631),
                np.array(transform, float)[::-1],
                *[np.array(size)[::-1]] * 2,
            ),
        ),
    )


def box_of(rows: Frames, i: int, part: tuple[int, int, int, int] | None = None) -> Any:
    row, col, height, width = part or (0, 0, *rows.shape[i])
    left, top = rows.transform[i, 2] + col, rows.transform[i, 5] - row
    return shapely.box(left, top - height, left + width, top)


def by_hand(scenes: Frames, windows: Windows, others: Frames, rule: Rule) -> list[int]:
    """Find the best observation for each window by comparing all of them."""
    found = []
    for scene, *part in zip(*(column.tolist() for column in windows), strict=True):
        window = box_of(scenes, scene, tuple(part))
        place = scenes.place[scene]
        options = []
        for j in range(len(others.place)):
            share = window.intersection(box_of(others, j)).area / window.area
            here, there = scenes.time[scene], others.time[j]
            dated = NO_TIME not in (here, there) and not rule.ignores_date
            gap = abs(int(here) - int(there)) if dated else 10**18
            days = abs(int(here) // DAY - int(there) // DAY) if dated else 0
            if rule.max_day_gap is not None and days > rule.max_day_gap:
                continue
            if place >= 0 and others.place[j] == place:
                # Take the nearest observation of a place, then check whether it covers enough.
                options.append(((0, gap, int(there) if dated else 0, j), j, share))
            elif min(place, others.place[j]) < 0 and share >= rule.min_overlap and share > 0:
                options.append(((1, gap, -round(share, 5), j), j, share))
        _, best, share = min(options, default=((), -1, 0.0))
        found.append(best if share >= rule.min_overlap and share > 0 else -1)
    return found


ROW = st.tuples(
    st.integers(-1, 2),
    st.one_of(st.none(), st.integers(0, 12)),
    st.integers(0, 4).map(lambda v: 8 * v),
    st.integers(0, 4).map(lambda v: 8 * v),
    st.sampled_from([16, 24]),
)


@settings(deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=6),
    st.lists(ROW, min_size=1, max_size=8, unique_by=lambda row: row[:2]),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([0.0, 0.45, 0.9]),
    st.sampled_from([None, 8, 10]),
)
def test_matches_are_those_of_a_search_by_hand(
    scenes: list[Any], others: list[Any], ignores: bool, gap: int | None, least: float, size: Any
) -> None:
    # Observations of a table are sorted by place and time, those without a time first.
    others = sorted(others, key=lambda row: (row[0], -1 if row[1] is None else row[1]))
    one, two = frames(scenes), frames(others)
    windows = window_grid(one.shape, size)
    rule = Rule(ignores, gap, least)
    chosen, covered = match_windows(one, windows, two, rule)
    assert chosen.tolist() == by_hand(one, windows, two, rule)
    assert ((covered > 0) == (chosen >= 0)).all()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from(['shift', 'drop']),
)
def test_windows_cover_scenes(sizes: list[tuple[int, int]], size: int | None, edge: Any) -> None:
    windows = window_grid(np.array(sizes), size, edge)
    for scene, (height, width) in enumerate(sizes):
        hits = np.zeros((height, width), int)
        of_scene = [w for w in zip(*windows, strict=True) if w[0] == scene]
        for _, row, col, rows, cols in of_scene:
            assert (rows, cols) == (min(size or height, height), min(size or width, width))
            assert row + rows <= height
            assert col + cols <= width
            hits[row : row + rows, col : col + cols] += 1
        if edge == 'shift' or size is None:
            assert (hits > 0).all()
            want = 1 if size is None else -(-height // size) * -(-width // size)
            assert len(of_scene) == want
        else:
            full = hits[: height // size * size, : width // size * size]
            assert (full == 1).all()
            assert hits.sum() == full.sum()


def test_the_earlier_of_two_equally_near_observations_is_chosen() -> None:
    scenes, others = frames([(0, 5, 0, 0, 16)]), frames([(0, 3, 0, 0, 16), (0, 7, 0, 0, 16)])
    windows = window_grid(scenes.shape, None)
    assert match_windows(scenes, windows, others, Rule(False, None, 0.5))[0].tolist() == [0]


@pytest.mark.parametrize('ignores', [True, False])
def test_adjacent_tiles_are_chosen_by_coverage(ignores: bool) -> None:
    scenes = frames([(-1, 5, 0, 0, 32)])
    others = frames([(-1, 5, -40, 0, 60), (-1, 5, 18, 0, 60)])
    windows = window_grid(scenes.shape, 16)
    chosen, covered = match_windows(scenes, windows, others, Rule(ignores, None, 0.5))
    assert chosen.tolist() == [0, 1, 0, 1]
    assert covered.tolist() == pytest.approx([1, 14 / 16, 1, 14 / 16])
