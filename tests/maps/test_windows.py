from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.maps.make.windows import Axis, Strip, Sums, Tile, Tiling, blend_row, regroup

lengths = st.integers(1, 80)
sizes = st.integers(1, 20)
overlaps = st.floats(0, 0.99)


@given(lengths, sizes, overlaps)
def test_windows_cover_the_scene(length: int, size: int, overlap: float) -> None:
    axis = Axis.cover(length, size, overlap)
    hits = np.zeros(length, int)
    for start in axis.starts:
        assert 0 <= start <= length - axis.size
        hits[start : start + axis.size] += 1
    assert hits.min() >= 1
    assert axis.size == min(size, length)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.size == length


@given(lengths, sizes, overlaps)
def test_neighbours_keep_the_overlap(length: int, size: int, overlap: float) -> None:
    axis = Axis.cover(length, size, overlap)
    steps = np.diff(axis.starts)
    assert (steps >= 1).all()
    # A window advances by at least one patch.
    assert (steps <= max(1, axis.size * (1 - overlap))).all()


@given(lengths, sizes, overlaps)
def test_weights_of_a_patch_sum_to_one(length: int, size: int, overlap: float) -> None:
    axis = Axis.cover(length, size, overlap)
    total = np.zeros(length)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights > 0).all()
        total[start : start + axis.size] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_are_lowest_at_the_border_of_a_window() -> None:
    weights = Axis.cover(28, 14, 0.5).weights[1]
    assert weights[0] < 0.05
    assert weights[6] > 0.9


def _tiles(tiling: Tiling, channels: int, seed: int) -> list[Tile]:
    random = np.random.default_rng(seed)
    height, width = tiling.rows.length * tiling.patch_size, tiling.cols.length * tiling.patch_size
    valid = random.random((height, width)) < 0.3
    tiles = []
    for position in tiling:
        row, col, h, w = tiling.pixels(position)
        values = random.random((channels, tiling.rows.size, tiling.cols.size), np.float32)
        tiles.append(Tile(position, values, valid[row : row + h, col : col + w]))
    return tiles


def _blend(tiling: Tiling, tiles: list[Tile]) -> list[Strip]:
    """Blend row after row."""
    strips: list[Strip] = []
    left_over: Sums | None = None
    for i in range(len(tiling.rows.starts)):
        row = [tile for tile in tiles if tile.position.i == i]
        strip, left_over = blend_row(tiling, i, row, left_over, len(tiles[0].values))
        strips.append(strip)
    return strips


def _brute_force(tiling: Tiling, tiles: list[Tile]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean with a Hann window over the whole scene at once."""
    p = tiling.patch_size
    shape = (tiling.rows.length, tiling.cols.length)
    total, weight = np.zeros((len(tiles[0].values), *shape)), np.zeros(shape)
    valid = np.zeros((shape[0] * p, shape[1] * p), bool)
    n, m = tiling.rows.size, tiling.cols.size
    hann = np.outer(np.hanning(2 * n + 1)[1::2], np.hanning(2 * m + 1)[1::2])
    for position, values, mask in tiles:
        row, col, h, w = tiling.pixels(position)
        r, c = row // p, col // p
        total[:, r : r + n, c : c + m] += hann * values
        weight[r : r + n, c : c + m] += hann
        valid[row : row + h, col : col + w] = mask
    return total / weight, valid


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(2, 60), st.integers(2, 60)),
    st.integers(1, 6),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_streaming_equals_blending_at_once(
    shape: tuple[int, int], size: int, overlap: float, seed: int
) -> None:
    tiling = Tiling.cover(shape, 2, 2 * size, overlap)
    tiles = _tiles(tiling, 3, seed)
    strips = _blend(tiling, tiles)
    assert all(strip.values.shape[1] <= tiling.rows.size for strip in strips)
    values = np.concatenate([strip.values for strip in strips], axis=1)
    expected, valid = _brute_force(tiling, tiles)
    np.testing.assert_array_equal(np.concatenate([strip.valid for strip in strips]), valid)
    known = valid.reshape(tiling.rows.length, 2, tiling.cols.length, 2).any(axis=(1, 3))
    np.testing.assert_allclose(values[:, known], expected[:, known], atol=1e-5)
    assert np.isnan(values[:, ~known]).all()


@given(st.integers(0, 9))
def test_windows_without_data_may_be_left_out(seed: int) -> None:
    tiling = Tiling.cover((40, 60), 4, 16, 0.5)
    tiles = _tiles(tiling, 2, seed)
    ground = np.zeros((40, 60), bool)
    ground[:14, 30:50] = True
    masked = []
    for position, values, _ in tiles:
        row, col, h, w = tiling.pixels(position)
        masked.append(Tile(position, values, ground[row : row + h, col : col + w]))
    some = [tile for tile in masked if tile.valid.any()]
    assert 0 < len(some) < len(masked) / 2
    for whole, part in zip(_blend(tiling, masked), _blend(tiling, some), strict=True):
        np.testing.assert_array_equal(part.values, whole.values)
        np.testing.assert_array_equal(part.valid, whole.valid)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(1, 9))
def test_regroup_only_moves_the_cuts(heights: list[int], rows: int) -> None:
    total = sum(heights)
    values = np.arange(total * 3, dtype=np.float32).reshape(1, total, 3)
    valid = np.arange(total * 2 * 6).reshape(total * 2, 6) % 5 > 0
    cuts = np.cumsum([0, *heights])
    strips = [Strip(values[:, a:b], valid[2 * a : 2 * b]) for a, b in pairwise(cuts)]
    padded = np.concatenate([values[:, :1], values, values[:, -1:]], axis=1)
    top = 0
    for strip in regroup(strips, rows):
        height = min(rows, total - top)
        np.testing.assert_array_equal(strip.values, padded[:, top : top + height + 2])
        np.testing.assert_array_equal(strip.valid, valid[2 * top : 2 * (top + height)])
        top += height
    assert top == total


@pytest.mark.parametrize('window', [0, -16, 100])
def test_windows_must_be_multiples_of_the_patch_size(window: int) -> None:
    with pytest.raises(ValueError, match="multiple of the model's patch size"):
        Tiling.cover((300, 300), 16, window)


@pytest.mark.parametrize('overlap', [-0.1, 1.0, float('nan')])
def test_overlap_must_be_a_fraction(overlap: float) -> None:
    with pytest.raises(ValueError, match=r'\[0, 1\)'):
        Tiling.cover((300, 300), 16, 224, overlap)
